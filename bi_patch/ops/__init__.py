"""Operations in canonical orders, and the certificates that show which kernels keep them.

An order fixes how an operation reduces: for GEMM ascending K, one pass, one fp32 accumulator an output. Any kernel that
keeps the order may serve any number of rows. A certificate is the recorded evidence that a kernel keeps the order for
every number of rows that it will be given. A linear's route says which certified kernel serves how many rows.
"""
