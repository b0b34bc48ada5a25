"""Plans of runs on TPUs that need not be there, from what the compiler says: memory, traffic, links, kernels."""
