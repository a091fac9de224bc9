"""Chaos: everything under the load balancers and the load balancers themselves change, die and come, for minutes.

Why it exists: the promise is about bad days. Thousands of real connections to real servers stay open while backends
change faster than once a second, load balancers burn, are cut off and join, agents and the controller are killed, and
the router never stops sending established flows elsewhere. Every answer is compared byte by byte; one broken
connection whose backend lived is a failure of the run. The same run can be had with either baseline, for a harness
that never sees a broken connection proves nothing.

``schedule`` decides what happens when (a seed replays it), ``fleet`` does it to load balancers and router, ``pool`` to
backends, ``programs`` to agents and controller; ``watch`` looks on once a second; ``ledger`` keeps what happened and
``verdict`` says what it means; ``run`` joins them; ``report`` and ``plots`` write it down; ``show`` is what the command
calls.
"""
