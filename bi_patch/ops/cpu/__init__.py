"""Operations on CPU: the bundled kernels, the routes of linears, and the certificates."""
