// SPDX-License-Identifier: MIT
#pragma once

/// The backend for the host, complete: the policy Cpu and its kernels of every operation.
///
/// Where COLT5_DECLARE_KERNELS is defined, kernels are only declared, which compiles faster; one other translation unit
/// of the program includes <colt5/kernels.hpp>. Expressions are compiled where they are written.

#include <colt5/core/error.hpp>
#include <colt5/core/random.hpp>
#include <colt5/core/scalar.hpp>
#include <colt5/core/tensor.hpp>
#include <colt5/core/view.hpp>
#include <colt5/expr/expr.hpp>

#include <colt5/cpu/eigen.hpp>
#include <colt5/cpu/expr.hpp>
#include <colt5/cpu/policy.hpp>

#if defined(COLT5_DECLARE_KERNELS)
#include <colt5/cpu/declared.hpp>
#else
#include <colt5/cpu/adamw.hpp>
#include <colt5/cpu/append_keys.hpp>
#include <colt5/cpu/causal_key_counts.hpp>
#include <colt5/cpu/causal_top_k.hpp>
#include <colt5/cpu/causal_top_k_next.hpp>
#include <colt5/cpu/clean_padding.hpp>
#include <colt5/cpu/coordinate_descent.hpp>
#include <colt5/cpu/copy_sequences.hpp>
#include <colt5/cpu/copy_tokens.hpp>
#include <colt5/cpu/cumulative_softmax.hpp>
#include <colt5/cpu/dense_attention.hpp>
#include <colt5/cpu/dropout.hpp>
#include <colt5/cpu/embedding.hpp>
#include <colt5/cpu/feed_forward.hpp>
#include <colt5/cpu/gather.hpp>
#include <colt5/cpu/gathered_attention.hpp>
#include <colt5/cpu/global_norm.hpp>
#include <colt5/cpu/layer_norm.hpp>
#include <colt5/cpu/linear.hpp>
#include <colt5/cpu/local_attention.hpp>
#include <colt5/cpu/look_back.hpp>
#include <colt5/cpu/map_tokens.hpp>
#include <colt5/cpu/norm_linear.hpp>
#include <colt5/cpu/null_key.hpp>
#include <colt5/cpu/null_query.hpp>
#include <colt5/cpu/projected_local_attention.hpp>
#include <colt5/cpu/relative_position_bias.hpp>
#include <colt5/cpu/rms_norm.hpp>
#include <colt5/cpu/rotary.hpp>
#include <colt5/cpu/route_blocks.hpp>
#include <colt5/cpu/route_logits.hpp>
#include <colt5/cpu/sinkhorn.hpp>
#include <colt5/cpu/swap_first_axes.hpp>
#include <colt5/cpu/top_k.hpp>
#include <colt5/cpu/windows.hpp>
#include <colt5/cpu/zero.hpp>
#endif

#include <colt5/op/cross_entropy.hpp>
#include <colt5/op/gelu.hpp>
#include <colt5/op/softmax.hpp>
#include <colt5/op/topk.hpp>
