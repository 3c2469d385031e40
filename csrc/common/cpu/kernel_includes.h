// The headers that CPU kernels use. foreach_isa.h includes this file before it compiles the kernels, because the code
// of these headers must not be compiled for an instruction set that the processor may lack. simd.h also includes this
// file, so an editor can parse a kernel file on its own.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/cpu/batch.h"
#include "common/cpu/isa.h"
#include "common/cpu/work.h"
#include "common/dispatch.h"
#include "common/host_device.h"
#include "common/series.h"
