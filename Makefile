# SPDX-License-Identifier: MIT
# A thin wrapper around CMake's presets (CMakePresets.json) and scripts/.
MAKEFLAGS += --no-print-directory
PREFIX ?= /usr/local
FUZZ_SECONDS ?= 60
DEMO_STEPS ?= 200

# Ninja where there is one; a build folder keeps what it was made with.
CONFIGURE = CMAKE_GENERATOR=$$(command -v ninja >/dev/null && echo Ninja || \
    echo 'Unix Makefiles') cmake --preset
BUILD := cmake --build -j $(shell nproc) --preset
# Some kernels lay out memory at random where the thread sanitizer's is.
SETARCH := $(shell setarch -R true 2>/dev/null && echo setarch -R)

.PHONY: all help demo test bench lint format sanitize address thread fuzz \
        python install clean

all: ## build the library, its tools and examples, in build/
	@scripts/setup
	@$(CONFIGURE) default >/dev/null
	@$(BUILD) default

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: all ## train a Mixture-of-Experts model on 4 processes: under a minute
	@scripts/demo build --steps $(DEMO_STEPS)

test: ## build and run the tests
	@scripts/setup --test
	@$(CONFIGURE) test >/dev/null
	@$(BUILD) test
	@ctest --preset test

bench: all ## time dispatch and combine beside memcpy and MPI
	@scripts/bench build

lint: ## check the style, the layers and what static analysis finds
	@scripts/setup --lint
	@$(CONFIGURE) default >/dev/null
	@scripts/lint build

format: ## let clang-format have its way
	@scripts/check-format --fix

sanitize: address thread ## the tests under both of these

address: ## the tests under the address and undefined sanitizers
	@scripts/setup --test
	@$(CONFIGURE) address >/dev/null
	@$(BUILD) address
	@ctest --preset address

thread: ## the tests whose ranks are threads, under the thread sanitizer
	@scripts/setup --test
	@$(CONFIGURE) thread >/dev/null
	@$(BUILD) thread
	@$(SETARCH) ctest --preset thread

fuzz: ## run each fuzz target for FUZZ_SECONDS (60)
	@scripts/setup --test
	@$(CONFIGURE) fuzz >/dev/null
	@$(BUILD) fuzz
	@scripts/fuzz build-fuzz $(FUZZ_SECONDS)

python: ## install the Python packages in .venv/python, check and test them
	@scripts/setup --python
	@scripts/check-python

install: ## install to PREFIX (/usr/local), below DESTDIR
	@scripts/setup
	@$(CONFIGURE) default -DCMAKE_INSTALL_PREFIX=$(PREFIX) >/dev/null
	@$(BUILD) default
	@cmake --install build

clean: ## remove every build folder
	rm -rf build build-address build-clang build-fuzz build-thread
