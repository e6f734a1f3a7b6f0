// SPDX-License-Identifier: MIT
#include "module/invariances.hpp"

using namespace support;

namespace {
constexpr TransformerBlockConfig config = invariance_config(RouterType::coor_descent);
template <typename Scalar>
using Block = colt5::ConditionalRoutedTransformerBlock<config, Scalar, Cpu>;
}  // namespace

TEST_CASE_TEMPLATE("invariances, coordinate descent: batched equals one at a time, bit for bit", T, float, double) {
    check_batched_equals_alone<Block<T>>();
}
TEST_CASE_TEMPLATE("invariances, coordinate descent: padding never changes a real token", T, float, double) {
    check_padding_is_not_seen<Block<T>>();
}
TEST_CASE_TEMPLATE("invariances, coordinate descent: padding may hold anything", T, float, double) {
    check_padding_may_hold_anything<Block<T>>();
}
TEST_CASE_TEMPLATE("invariances, coordinate descent: the same bits from run to run and with any number of threads", T,
                   float, double) {
    check_threads_change_nothing<Block<T>>();
}
