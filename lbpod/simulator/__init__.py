"""A whole cluster in one process, on virtual time, replayed by one number.

Nothing is imported here: the bounds have to be lowered before any module of the core is (``scale``).
"""
