"""Evaluation: accuracies and their errors (``evaluate``), the papers' protocols, which questions were solved
(``verdicts``), and what a model makes of texts and of its own answers (``analyses``, ``diversity``).
"""
