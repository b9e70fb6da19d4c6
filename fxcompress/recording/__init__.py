"""Recording: run a model once on real tensors and write down, as a ``torch.fx`` graph, what it did.

``session``    one recorded run: which torch calls, which module calls, on which tensors
``functions``  what a torch function is: a record, a harmless question about a tensor, a read of its data
``inputs``     forward's arguments: names, defaults, structures; the same inputs at other sizes and with other values
``structure``  containers of any kind taken apart into tensors and put together again
``alignment``  two runs at different sizes -> one graph whose integers follow the sizes
``constants``  what no input can change becomes a buffer
``guards``     what the finished graph checks about its inputs when it runs
``internals``  everything that leans on internals of one torch version
"""
