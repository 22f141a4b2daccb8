// All operations for one instruction set. build_cpu.py compiles this file once for each, with SET naming the table that it defines.
#include "kernels.h"

#include "all_reduce.h"
#include "attention.h"
#include "filters.h"
#include "gumbel.h"
#include "head.h"
#include "product.h"
#include "rows.h"
#include "product_int8.h"

namespace {
template <class Arguments, void (*run)(const Arguments&, const Team&)>
void operation(const void* arguments, const Team& team) {
    run(*(const Arguments*)arguments, team);
}
}  // namespace

// In the order of `Operation`.
extern "C" __attribute__((visibility("hidden"))) const Kernels SET = {{
    operation<Product, product>,
    operation<GroupedProduct, grouped_product>,
    operation<Head, head>,
    operation<Head, head_block>,
    operation<Norm, norm>,
    operation<Qkv, qkv>,
    operation<Activation, activation>,
    operation<Attention, attention>,
    operation<AllReduce, all_reduce>,
    operation<GumbelMax, gumbel_max>,
    operation<Quantize, quantize>,
    operation<ProductInt8, product_int8>,
    operation<ProductInt8, rescale_int8>,
    operation<GroupedProductInt8, grouped_product_int8>,
    operation<MaskBits, mask_bits>,
    operation<Penalize, penalize>,
    operation<Truncate, truncate>,
}};
