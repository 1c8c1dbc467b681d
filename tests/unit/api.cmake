# SPDX-License-Identifier: MIT
# The public interface: its errors, its queue, what it leaves behind.
foreach(name errors collective queue leaks mask send_only structs waits)
  epx_test(api_${name} api_${name}.c)
  target_link_libraries(api_${name} PRIVATE epx_world)
endforeach()
if(UCX_INCLUDE_DIR AND EPX_UCX)
  foreach(nodes 2 4)
    add_test(NAME api_mask_${nodes}_nodes COMMAND api_mask ${nodes})
    set_tests_properties(api_mask_${nodes}_nodes PROPERTIES TIMEOUT 60)
  endforeach()
endif()
