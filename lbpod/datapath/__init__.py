"""The border to the kernel: one port, and the three ways to stand behind it (memory, faulty, kernel).

The core knows slots and records; the kernel knows maps, file descriptors and errno. Only this package knows both, so
that a foreign exception is mapped once, and so that everything above can be tested without a kernel.
"""
