// A shared library that is loaded at run time and never unloaded: its threads may still be inside at the end.
#pragma once

#include <dlfcn.h>

#include <string>

#include "error.h"

namespace rx {

class Library {
  public:
    // `why` gets the loader's reason when it is not there; `is_open` says whether it is.
    explicit Library(const std::string &path) : handle_(::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
        if (!handle_) {
            const char *reason = ::dlerror();
            why_ = first_line(reason ? reason : "unknown reason");
        }
    }

    bool is_open() const { return handle_ != nullptr; }
    const std::string &why() const { return why_; }

    // A function of it, null when it has none of that name.
    template <typename Function>
    Function *find(const char *name) const {
        return handle_ ? reinterpret_cast<Function *>(::dlsym(handle_, name)) : nullptr;
    }

  private:
    void *const handle_;
    std::string why_;
};

}  // namespace rx
