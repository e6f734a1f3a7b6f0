// SPDX-License-Identifier: MIT
#include "module/invariances.hpp"

using namespace support;

namespace {
/// ε-scaling, short sequences that are not routed, and cosine routing.
constexpr TransformerBlockConfig config = [] {
    TransformerBlockConfig with_cosine = invariance_config(RouterType::coor_descent);
    with_cosine.router_kwargs.coor_descent = colt5::CoordinateDescentKwargs::version_0_11();
    with_cosine.router_kwargs.coor_descent.cosine_sim_routing = true;
    return with_cosine;
}();
template <typename Scalar>
using Block = colt5::ConditionalRoutedTransformerBlock<config, Scalar, Cpu>;
}  // namespace

TEST_CASE_TEMPLATE("invariances, routing of 0.11: batched equals one at a time, bit for bit", T, float, double) {
    check_batched_equals_alone<Block<T>>();
}
TEST_CASE_TEMPLATE("invariances, routing of 0.11: padding never changes a real token", T, float, double) {
    check_padding_is_not_seen<Block<T>>();
}
TEST_CASE_TEMPLATE("invariances, routing of 0.11: padding may hold anything", T, float, double) {
    check_padding_may_hold_anything<Block<T>>();
}
TEST_CASE_TEMPLATE("invariances, routing of 0.11: the same bits from run to run and with any number of threads", T,
                   float, double) {
    check_threads_change_nothing<Block<T>>();
}
