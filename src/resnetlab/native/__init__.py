"""C++ for CPUs: `build` compiles it, where PyTorch need not be imported yet, and `functions` calls it."""
