// Replaces CUDA's headers when kernels are compiled for the host.
#pragma once
#include <assert.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <type_traits>
#include <utility>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __constant__
// In-place operations pass the same buffer twice, which __restrict__ does not allow; it is ignored here.
#define __restrict__
#define __restrict
#define __align__(n) __attribute__((aligned(n)))
#define warpSize 32

#include "sim/block.h"
#include "sim/kernel.h"
#include "sim/vectors.h"
#include "sim/numbers.h"
#include "sim/warp.h"
#include "sim/matrix.h"
#include "sim/copy.h"
#include "sim/ptx.h"
#ifdef SIM_CHECKED
#include "sim/hooks.h"
#endif
