#pragma once

#include <cstring>
#include <exception>

// Calls from ctypes: returns 0, or 1 with the message of the exception in `error`.
template <class Call>
int guarded(char* error, int size, const Call& call) {
  try {
    call();
    return 0;
  } catch (const std::exception& e) {
    std::strncpy(error, e.what(), static_cast<size_t>(size) - 1);
    return 1;
  }
}
