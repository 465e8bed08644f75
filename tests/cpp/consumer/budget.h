#pragma once

// Checks the default budget of logits on each device, without a GPU.
void check_default_budget();
