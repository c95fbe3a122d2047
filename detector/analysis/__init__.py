"""Why a loss does what it does: object locations, weight norms, gradients and activations, of finished
runs."""
