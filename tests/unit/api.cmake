# SPDX-License-Identifier: MIT
# The public interface: its errors, its queue, what it leaves behind.
foreach(name errors collective queue leaks mask send_only structs waits)
  epx_test(api_${name} api_${name}.c)
  target_link_libraries(api_${name} PRIVATE epx_world)
endforeach()
