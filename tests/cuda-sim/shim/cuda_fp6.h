#error "cuda_fp6.h is not supported on the CPU device: no 8, 6 or 4 bit floats"
