// The tags that say which class of error an op throws. Torch's stable ABI passes on the text of an
// error, but not always its class. So an op puts a tag in front of the text, and each front end
// removes the tag and throws the class that it names. Needs no torch.
#pragma once

namespace simpo_ext {

inline constexpr char kIndexErrorTag[] = "[simpo_ext:IndexError] ";
inline constexpr char kValueErrorTag[] = "[simpo_ext:ValueError] ";

}  // namespace simpo_ext
