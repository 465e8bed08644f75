// The implementations of every op for one device.
//
// The ops are templates. They check, allocate and call the kernels of a Device, and do no
// arithmetic. A Device has
//
//   Device(tensor, name)     for the duration of an op; refuses a tensor that it has no kernels for
//   check(tensor, name)      refuses a tensor on another device than the first
//   kChunkColumns            the most columns of a chunk of logits: see linear/plan.h
//   new_large(like, sizes)   a tensor as large as logits, which may already hold zeros
//   new_large_for_writing(like, sizes)
//                            the same for a tensor that the op writes completely
//   adds_products()          whether add_product(sum, a, b, is_first) can do sum += a b inside the
//                            matrix product
//   token_logps(args), ...   the kernels of core/kernels.h; throws the errors that they return
#pragma once

#include <torch/csrc/stable/library.h>

#include "ops/linear/backward.h"
#include "ops/linear/forward.h"
#include "ops/linear/vocab_shards.h"
#include "ops/preference_loss.h"
#include "ops/registration.h"
#include "ops/sequences.h"
#include "ops/token_logps.h"
#include "ops/vocab_shards.h"

namespace simpo_ext::ops {

template <class Device>
void register_ops(Library& m) {
  m.impl("token_logps", TORCH_BOX(&token_logps<Device>));
  m.impl("token_logps_report", TORCH_BOX(&token_logps_report<Device>));
  m.impl("token_logps_backward", TORCH_BOX(&token_logps_backward<Device>));
  m.impl("token_logps_backward_", TORCH_BOX(&token_logps_backward_inplace<Device>));

  m.impl("sequence_targets", TORCH_BOX(&sequence_targets<Device>));
  m.impl("sequence_logps", TORCH_BOX(&sequence_logps<Device>));
  m.impl("sequence_logps_backward", TORCH_BOX(&sequence_logps_backward<Device>));
  m.impl("preference_loss", TORCH_BOX(&preference_loss<Device>));
  m.impl("preference_loss_backward", TORCH_BOX(&preference_loss_backward<Device>));

  m.impl("linear_token_logps", TORCH_BOX(&linear_token_logps<Device>));
  m.impl("linear_token_logps_report", TORCH_BOX(&linear_token_logps_report<Device>));
  m.impl("linear_token_logps_backward", TORCH_BOX(&linear_token_logps_backward<Device>));

  m.impl("token_logps_shard", TORCH_BOX(&token_logps_shard<Device>));
  m.impl("token_logps_merge", TORCH_BOX(&token_logps_merge<Device>));
  m.impl("token_logps_shard_backward", TORCH_BOX(&token_logps_shard_backward<Device>));
  m.impl("token_logps_shard_backward_", TORCH_BOX(&token_logps_shard_backward_inplace<Device>));
  m.impl("linear_token_logps_shard", TORCH_BOX(&linear_token_logps_shard<Device>));
  m.impl("linear_token_logps_merge", TORCH_BOX(&linear_token_logps_merge<Device>));
  m.impl("linear_token_logps_shard_backward",
         TORCH_BOX(&linear_token_logps_shard_backward<Device>));
  m.impl("linear_token_logps_dhidden", TORCH_BOX(&linear_token_logps_dhidden<Device>));
}

}  // namespace simpo_ext::ops
