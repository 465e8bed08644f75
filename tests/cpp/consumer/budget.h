#pragma once

// The default budget of logits, by device, without a GPU.
void check_default_budget();
