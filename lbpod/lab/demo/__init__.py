"""The demo: three load balancers before one audience, while everything under them changes.

Why it exists: a promise is believed when it is seen. The same script of changes runs three times on the same hosts,
once with Holdfast and twice with what is common today, and every answer that a client gets is compared byte by byte.

``timeline`` decides what happens when, ``stage`` does it to real programs in the lab, ``tally`` counts, ``view`` shows,
``show`` is the loop that joins them. Load balancers are lost and come as in ``lbpod.lab.chaos``.
"""
