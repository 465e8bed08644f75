// Registers the ops when the library is loaded, unless another copy in the process has done so.
// Torch accepts the ops of a namespace once, and a second STABLE_TORCH_LIBRARY crashes the process.
// So a second copy registers nothing, and simpo_ext_load_error() returns the reason.

#include "ops/registration.h"

#include <dlfcn.h>
#include <link.h>

#include <optional>
#include <string>
#include <vector>

#include "simpo_ext/build_info.h"

namespace simpo_ext::ops {
namespace {

constexpr const char* kNamespace = "simpo_ext";

// The path of the library that contains the address.
const char* path_of(const void* address) {
  Dl_info info{};
  return dladdr(address, &info) != 0 ? info.dli_fname : "libsimpo_ext.so";
}

std::string path_of_another_copy(const std::string& own_path) {
  std::vector<std::string> loaded;
  const auto append = [](dl_phdr_info* info, size_t, void* names) {
    static_cast<std::vector<std::string>*>(names)->emplace_back(info->dlpi_name);
    return 0;
  };
  dl_iterate_phdr(append, &loaded);
  for (const std::string& name : loaded) {
    void* library = dlopen(name.c_str(), RTLD_NOLOAD | RTLD_LAZY);
    if (library == nullptr) continue;
    // dlsym also finds the function in a library that this one depends on.
    const void* function = dlsym(library, "simpo_ext_load_error");
    const std::string path = function != nullptr ? path_of(function) : own_path;
    dlclose(library);
    if (path != own_path) return path;
  }
  return "another copy";
}

bool is_first_copy(const char* path) {
  TorchLibraryHandle probe = nullptr;
  if (aoti_torch_library_init_def(kNamespace, path, 0, &probe) != AOTI_TORCH_SUCCESS) return false;
  aoti_torch_delete_library_object(probe);
  return true;
}

class Registration {
 public:
  Registration() {
    static const char of_this_library = 0;
    const char* path = path_of(&of_this_library);  // torch names it in its own error messages
    if (!is_first_copy(path)) {
      error_ = "expected one copy of simpo_ext's library in this process, but " +
               path_of_another_copy(path) + " was loaded before " + path +
               "; link or load only one of them";
      return;
    }
    schemas_.emplace(Library::Kind::DEF, &define_ops, kNamespace, nullptr, path, 0);
    cpu_.emplace(Library::Kind::IMPL, &register_cpu_ops, kNamespace, "CPU", path, 0);
    cuda_.emplace(Library::Kind::IMPL, &register_cuda_ops, kNamespace, "CUDA", path, 0);
  }

  const char* error() const { return error_.empty() ? nullptr : error_.c_str(); }

 private:
  using Part = std::optional<torch::stable::detail::StableTorchLibraryInit>;

  std::string error_;
  Part schemas_, cpu_, cuda_;
};

const Registration registration;

}  // namespace
}  // namespace simpo_ext::ops

extern "C" __attribute__((visibility("default"))) const char* simpo_ext_load_error() {
  return simpo_ext::ops::registration.error();
}
