"""The trainer's step on the machine at hand: ``python -m bench training``.

The trainer is the one that users run, on files made with LVIS's classes and image sizes. The backbone has
random weights, under frozen norms: no shape differs, and a step costs what it costs early in a training, when
few RoIs are foreground (``rows`` and ``foreground`` of a record).

How the loss's share is found: one trainer runs blocks of steps in turn with our loss and with the released
eager formula in its place, and marks around the loss's forward and backward pass take its time within the
step, on a GPU by events. The difference of two step times alone would be noise: batches differ in their sizes
by more than a loss takes. A replay of a saved batch outside of the trainer would find other caches, another
allocator and a host that is not busy; ``python -m bench gpu --batch`` does that, to compare kernels.
"""
