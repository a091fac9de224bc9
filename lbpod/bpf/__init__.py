"""The folder of the fast path's C, made importable only so that its compiled objects can be found inside a wheel.

There is no Python here: what the maps hold is described by `lbpod.datapath.layout`, and proven against the objects'
BTF.
"""
