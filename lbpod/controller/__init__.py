"""What every controller is made of, whatever tells it about the cluster: the loop around the Planner, the calls to the
agents, and the metrics about both.

The standalone controller feeds it from a file, the Kubernetes operator from the API; neither may know the other, and
both must push in the very same way.
"""
