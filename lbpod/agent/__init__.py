"""The asyncio shell of the pod: sockets, timers, files and logs around the Keeper.

It turns what happens into events, hands them to the core one at a time, and carries out the effects. It decides
nothing.
"""
