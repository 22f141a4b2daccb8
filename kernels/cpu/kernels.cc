// All kernels for one instruction set. build.py compiles this file once for each, with SET naming the table that it defines.
#include "kernels.h"

#include "product.h"

extern "C" __attribute__((visibility("hidden"))) const Kernels SET = {product};
