# SPDX-License-Identifier: Apache-2.0
# A short front for meson. BUILD is where it builds; O holds further meson options.
BUILD ?= build
O ?=

all: $(BUILD)/build.ninja
	@ninja -C $(BUILD) -n | grep -q 'no work to do' || ninja -C $(BUILD) --quiet

$(BUILD)/build.ninja:
	@tests/deps build
	@meson setup $(BUILD) $(O) >/dev/null || { cat $(BUILD)/meson-logs/meson-log.txt; exit 1; }

demo: all
	@BUILD=$(BUILD) tests/demo

check:
	@tests/run check

check-long:
	@tests/run check-long

bench: all
	@BUILD=$(BUILD) bench/run

# Farpage against software that is not ours: peers and roles.
results-interop: all
	@tests/interop/results $(BUILD)

install: all
	@DESTDIR="$(DESTDIR)" meson install -C $(BUILD) --quiet --no-rebuild

clean:
	rm -rf build build-*

.PHONY: all demo check check-long bench results-interop install clean
