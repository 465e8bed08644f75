// Checks for test programs. The program exits with 1 at the first one that fails.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// The function must throw an Error whose message contains message_part, and no tag of an op.
template <typename Error, typename Function>
void require_error(const std::string& message_part, const Function& function) {
  try {
    function();
  } catch (const Error& error) {
    const std::string message = error.what();
    require(message.find(message_part) != std::string::npos, error.what());
    require(message.find("[simpo_ext:") == std::string::npos, error.what());
    return;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "wrong kind of error for '%s': %s\n", message_part.c_str(), error.what());
    std::exit(1);
  }
  std::fprintf(stderr, "no error for '%s'\n", message_part.c_str());
  std::exit(1);
}
