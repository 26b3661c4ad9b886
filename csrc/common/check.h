#pragma once

#include <sstream>
#include <stdexcept>

namespace grok {

// Throws std::invalid_argument, a ValueError in Python, whose message is the parts joined.
template <class... Parts>
void check(bool ok, const Parts&... message) {
  if (ok) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::invalid_argument(text.str());
}

}  // namespace grok
