"""Classical statistical models and exact solvers."""
