"""report.html and the comparison of two runs: pages that need no network.

``page`` is the report; ``panels`` says which metrics are drawn, ``charts`` and ``heatmap`` draw them; ``questions`` looks
at single questions, ``samples`` at single answers; ``compare`` puts two runs side by side.
"""
