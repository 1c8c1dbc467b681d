# SPDX-License-Identifier: MIT
# What can be chosen when building, and the flags that everything shares.

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE RelWithDebInfo CACHE STRING "" FORCE)
endif()

option(EPX_BUILD_TOOLS "build epx-run, epx-info and epx-bench" ON)
option(EPX_BUILD_EXAMPLES "build the examples" ON)
option(EPX_BUILD_TESTS "build the tests (needs cmocka)" OFF)
option(EPX_BUILD_FUZZERS "build the libFuzzer targets (needs clang)" OFF)
option(EPX_PYTHON "install what the Python packages need (pyproject.toml)" OFF)
option(EPX_WERROR "treat warnings as errors" OFF)
set(EPX_SANITIZE "" CACHE STRING
    "sanitizers, for example address,undefined or thread")

find_package(PkgConfig REQUIRED) # here, so that every folder has its commands

set(CMAKE_C_STANDARD 11)
set(CMAKE_C_STANDARD_REQUIRED ON)
set(CMAKE_C_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
string(REPLACE "-O2" "-O3" CMAKE_C_FLAGS_RELWITHDEBINFO
       "${CMAKE_C_FLAGS_RELWITHDEBINFO}")
# Checks stay on in every build; there is no NDEBUG behaviour to depend on.
string(REPLACE "-DNDEBUG" "" CMAKE_C_FLAGS_RELWITHDEBINFO
       "${CMAKE_C_FLAGS_RELWITHDEBINFO}")

# Results are the same bits on every machine: no contraction of a * b + c.
add_compile_options(-Wall -Wextra -Wshadow -Wvla -ffp-contract=off
                    -fno-math-errno -fvisibility=hidden)
add_compile_options($<$<COMPILE_LANGUAGE:C>:-Wstrict-prototypes>
                    $<$<COMPILE_LANGUAGE:C>:-Wmissing-prototypes>)
add_compile_definitions(_GNU_SOURCE)
if(EPX_WERROR)
  add_compile_options(-Werror)
endif()
if(EPX_SANITIZE MATCHES address) # more compiles for longer and is no faster
  string(REPLACE "-O3" "-O1" CMAKE_C_FLAGS_RELWITHDEBINFO
         "${CMAKE_C_FLAGS_RELWITHDEBINFO}")
endif()
if(EPX_SANITIZE)
  add_compile_options(-fsanitize=${EPX_SANITIZE} -fno-omit-frame-pointer
                      -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${EPX_SANITIZE})
  # clang leaves the sanitizers' runtime to the program: libepx.so, which else
  # must find all it needs, may want it.
  if(CMAKE_C_COMPILER_ID MATCHES "Clang")
    link_libraries(-Wl,-z,undefs)
  endif()
endif()
