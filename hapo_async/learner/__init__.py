"""What a learner rank computes: the model (``policy``), its output head in bounded memory (``head``), the critic, what is
measured before a step (``prepass``) and during it (``tally``), and the step itself (``learn``) on a ``backend``.
"""
