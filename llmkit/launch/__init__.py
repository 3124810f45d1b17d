"""One machine, several machines, clusters: how a training is started there, and what it will take."""
