// SPDX-License-Identifier: MIT
#pragma once

/// Everything for the GPU; compile with nvcc -std=c++20 --expt-relaxed-constexpr and link with cublasLt.
///
/// Any other compiler sees only the declarations of the kernels, as nvcc does where COLT5_DECLARE_KERNELS is defined.
/// One translation unit of the program, for nvcc, includes <colt5/kernels.cuh>.

#include <colt5/core/error.hpp>
#include <colt5/core/random.hpp>
#include <colt5/core/scalar.hpp>
#include <colt5/core/tensor.hpp>
#include <colt5/core/view.hpp>
#include <colt5/expr/expr.hpp>

#include <colt5/cuda/policy.cuh>

#if defined(COLT5_DECLARE_KERNELS) || !defined(__CUDACC__)
#include <colt5/cuda/declared.cuh>
#else
#include <colt5/cuda/adamw.cuh>
#include <colt5/cuda/append_keys.cuh>
#include <colt5/cuda/causal_key_counts.cuh>
#include <colt5/cuda/causal_top_k.cuh>
#include <colt5/cuda/causal_top_k_next.cuh>
#include <colt5/cuda/coordinate_descent.cuh>
#include <colt5/cuda/coordinate_descent_vjp.cuh>
#include <colt5/cuda/copy_sequences.cuh>
#include <colt5/cuda/copy_tokens.cuh>
#include <colt5/cuda/cumulative_softmax.cuh>
#include <colt5/cuda/dense_attention.cuh>
#include <colt5/cuda/dropout.cuh>
#include <colt5/cuda/embedding.cuh>
#include <colt5/cuda/feed_forward.cuh>
#include <colt5/cuda/gather.cuh>
#include <colt5/cuda/gathered_attention.cuh>
#include <colt5/cuda/global_norm.cuh>
#include <colt5/cuda/layer_norm.cuh>
#include <colt5/cuda/linear.cuh>
#include <colt5/cuda/local_attention.cuh>
#include <colt5/cuda/look_back.cuh>
#include <colt5/cuda/map_tokens.cuh>
#include <colt5/cuda/norm_linear.cuh>
#include <colt5/cuda/null_key.cuh>
#include <colt5/cuda/null_query.cuh>
#include <colt5/cuda/projected_local_attention.cuh>
#include <colt5/cuda/relative_position_bias.cuh>
#include <colt5/cuda/rms_norm.cuh>
#include <colt5/cuda/rotary.cuh>
#include <colt5/cuda/route_blocks.cuh>
#include <colt5/cuda/route_logits.cuh>
#include <colt5/cuda/sinkhorn.cuh>
#include <colt5/cuda/swap_first_axes.cuh>
#include <colt5/cuda/top_k.cuh>
#include <colt5/cuda/windows.cuh>
#include <colt5/cuda/zero.cuh>
#endif
#if defined(__CUDACC__)
#include <colt5/cuda/expr.cuh>
#endif

#include <colt5/op/cross_entropy.hpp>
#include <colt5/op/gelu.hpp>
#include <colt5/op/softmax.hpp>
#include <colt5/op/topk.hpp>

#include <colt5/module/conditional_routed_attention.hpp>
#include <colt5/module/conditional_routed_autoregressive_attention.hpp>
#include <colt5/module/conditional_routed_cross_attention.hpp>
#include <colt5/module/conditional_routed_feed_forward.hpp>
#include <colt5/module/conditional_routed_image_attention.hpp>
#include <colt5/module/conditional_routed_transformer_block.hpp>
#include <colt5/module/conditional_routed_vit.hpp>
#include <colt5/module/embedding.hpp>
#include <colt5/module/encoder_decoder.hpp>
#include <colt5/module/language_model.hpp>
#include <colt5/module/ragged.hpp>
#include <colt5/module/routed.hpp>
#include <colt5/module/stack.hpp>

#include <colt5/optim/adamw.hpp>
#include <colt5/optim/clip.hpp>
#include <colt5/optim/loss_scale.hpp>
#include <colt5/optim/moving_average.hpp>
#include <colt5/optim/schedule.hpp>
