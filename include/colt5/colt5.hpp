// SPDX-License-Identifier: MIT
#pragma once

/// Everything for the host, but <colt5/io/…>, which reads and writes files and needs a JSON library, and
/// <colt5/module/paper.hpp>.

#include <colt5/cpu.hpp>

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
