# SPDX-License-Identifier: MIT
# The insides, module by module.
foreach(name heap control signal lost queue rank_list env status cores
        thread)
  epx_test(core_${name} core_${name}.c)
  target_link_libraries(core_${name} PRIVATE epx_world)
endforeach()

foreach(name shm strangers)
  epx_test(fabric_${name} fabric_${name}.c fabric_pair.c)
  target_link_libraries(fabric_${name} PRIVATE epx_world)
endforeach()

foreach(name pool numeric logfmt kernels)
  epx_test(cpu_${name} cpu_${name}.c)
  target_link_libraries(cpu_${name} PRIVATE epx_world epx_oracle)
endforeach()

foreach(name hostile_counts hostile_posts)
  epx_test(cpu_${name} cpu_${name}.c cpu_puppet.c)
  target_link_libraries(cpu_${name} PRIVATE epx_world)
endforeach()
