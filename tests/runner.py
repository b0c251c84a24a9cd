# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""Builds and runs the tests; see tests/run. Knows three kinds of steps: a build, meson's tests, and fuzzers.

What the tests' folders rely on:
  - cases are counted as cmocka and TAP print them; a program that prints neither is one case
  - a line with "skip" before a skipped case is its reason; a program that exits with 77 is skipped, its last line says why
  - a test of the suite `long` runs in check-long only; FARPAGE_LONG=1 is set there for tests that have a longer form.
    tests/long says how long each takes; what does not fit into half an hour waits for another day, and is named
  - tests/fuzz builds executables fuzz-NAME with -Dfuzz=true; tests/fuzz/corpus/NAME/ is what they start from
"""
import concurrent.futures
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

PASS, FAIL, SKIP = 'passed', 'failed', 'skipped'
CASE = re.compile(r'^\s*\[\s*(RUN|OK|FAILED|SKIPPED)\s*\]\s+(.+?)\s*$')
TAP = re.compile(r'^(not )?ok\b\s*\d*\s*-?\s*(.*?)\s*(?:#\s*(skip|todo)\b\S*\s*(.*))?$', re.I)
LOG_LINES = 150
JOBS = max(2, os.cpu_count() or 1)


class Count:
    def __init__(self):
        self.n = {PASS: 0, FAIL: 0, SKIP: 0}
        self.failed = []
        self.skips = []

    def add(self, kind, name, reason=''):
        self.n[kind] += 1
        if kind == FAIL:
            self.failed.append(name)
        if kind == SKIP:
            self.skips.append((name, reason or 'no reason given'))

    def closing(self):
        return '%d passed, %d failed, %d skipped' % (self.n[PASS], self.n[FAIL], self.n[SKIP])


def say(text=''):
    print(text, flush=True)


def skip_reason(lines):
    """The nearest line above that speaks of a skip."""
    for line in reversed(lines):
        if CASE.match(line):
            break
        if re.search(r'\bskip', line, re.I):
            return re.sub(r'^\W*(skip\w*)\W*', '', line.strip(), flags=re.I) or line.strip()
    return ''


def cmocka_cases(lines):
    """(name, kind, reason) of each case. The summary's repetitions do not follow a RUN line and are not counted."""
    running, out = None, []
    for i, line in enumerate(lines):
        m = CASE.match(line)
        if not m:
            continue
        word, name = m.groups()
        if word == 'RUN':
            if running:
                out.append((running, FAIL, ''))
            running = name
        elif running == name:
            kind = {'OK': PASS, 'FAILED': FAIL, 'SKIPPED': SKIP}[word]
            out.append((name, kind, skip_reason(lines[:i]) if kind == SKIP else ''))
            running = None
    if running:
        out.append((running + ' (did not end)', FAIL, ''))
    return out


def tap_cases(lines):
    out = []
    for line in lines:
        m = TAP.match(line)
        if not m:
            continue
        bad, name, directive, reason = m.groups()
        if directive and directive.lower() == 'skip':
            out.append((name or '?', SKIP, reason))
        else:
            out.append((name or '?', FAIL if bad and not directive else PASS, ''))
    return out


def cases_of(text):
    lines = text.splitlines()
    return cmocka_cases(lines) or tap_cases(lines)


def count_result(count, where, result):
    """One line of meson's testlog.json. Returns whether anything failed in it."""
    name = '%s %s' % (where, result['name'])
    text = (result.get('stdout') or '') + '\n' + (result.get('stderr') or '')
    outcome = result['result']
    ok = outcome in ('OK', 'EXPECTEDFAIL')
    if outcome == 'SKIP':
        last = [x for x in text.splitlines() if x.strip()]
        count.add(SKIP, name, skip_reason(text.splitlines()) or (last[-1].strip() if last else ''))
        return False
    cases = cases_of(text)
    for case, kind, reason in cases:
        count.add(kind, '%s: %s' % (name, case), reason)
    failed = any(kind == FAIL for _, kind, _ in cases)
    if not ok and not failed:
        count.add(FAIL, '%s (%s)' % (name, outcome.lower()))
        failed = True
    elif ok and not cases:
        count.add(PASS, name)
    return failed


def print_log(name, text):
    lines = text.splitlines()
    say('---- %s: what it printed%s' % (name, ', the end of it' if len(lines) > LOG_LINES else ''))
    for line in lines[-LOG_LINES:]:
        say('    ' + line)


def command(argv, env=None):
    """Run quietly; (ok, output)."""
    p = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, errors='replace')
    return p.returncode == 0, p.stdout


def build(count, where, options, cc, targets=(), env_extra=None):
    """Set up and build a directory; a failure counts as one failed test."""
    env = dict(os.environ, CC=cc, **(env_extra or {}))
    began = time.time()
    ok, out = True, ''
    if not os.path.exists(where + '/build.ninja'):
        shutil.rmtree(where, ignore_errors=True)
        ok, out = command(['meson', 'setup', where] + options, env)
    if ok:
        ok, out = command(['ninja', '-C', where, '-j%d' % JOBS] + list(targets), env)
    if not ok:
        count.add(FAIL, where + ': build')
        print_log(where + ': build', out)
        return False
    say('built %s in %.0f s' % (where, time.time() - began))
    return True


def meson_tests(count, where, args, env_extra, wrapper=None):
    env = dict(os.environ, **env_extra)
    for old in glob.glob(where + '/meson-logs/testlog*'):
        os.remove(old)
    argv = ['meson', 'test', '-C', where, '--no-rebuild', '--num-processes', str(JOBS)] + args
    if wrapper:
        argv += ['--wrapper', wrapper]
    began = time.time()
    p = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, errors='replace')
    shown = []
    for line in p.stdout:
        shown.append(line)
        if re.match(r'^\s*\d+/\d+ ', line):
            say('  ' + line.strip())
    p.wait()
    log = (glob.glob(where + '/meson-logs/testlog*.json') or [''])[0]  # its name tells the wrapper
    if not log:
        if 'No suitable tests' not in ''.join(shown) and 'No tests defined' not in ''.join(shown):
            count.add(FAIL, where + ': meson test')
            print_log(where + ': meson test', ''.join(shown))
        return
    with open(log, errors='replace') as f:
        for line in f:
            result = json.loads(line)
            if count_result(count, where, result):
                print_log('%s (%s, exit %s)' % (result['name'], result['result'].lower(), result.get('returncode')),
                          (result.get('stdout') or '') + '\n' + (result.get('stderr') or ''))
    say('ran the tests of %s in %.0f s' % (where, time.time() - began))


def fuzz_one(path, seconds):
    """(name, ok, output) of one fuzzer. New inputs go to a directory of their own; the corpus stays as it is."""
    name = os.path.basename(path)[len('fuzz-'):]
    corpus = 'tests/fuzz/corpus/' + name
    with tempfile.TemporaryDirectory(prefix='farpage-fuzz.') as work:
        argv = [path, '-max_total_time=%d' % seconds, '-timeout=10', '-rss_limit_mb=2048', '-print_final_stats=1',
                '-artifact_prefix=' + work + '/', work]
        if os.path.isdir(corpus):
            argv.append(corpus)
        p = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors='replace')
        out = p.stdout
        for found in glob.glob(work + '/crash-*') + glob.glob(work + '/timeout-*') + glob.glob(work + '/oom-*'):
            keep = 'build-fuzz/' + name + '-' + os.path.basename(found)
            shutil.copy(found, keep)
            out += '\nthe input is kept in %s\n' % keep
    return 'fuzz-' + name, p.returncode == 0, out


def fuzz(count, seconds):
    if not build(count, 'build-fuzz',
                 ['-Dfuzz=true', '-Db_sanitize=address,undefined', '-Db_lundef=false', '-Dbuildtype=debugoptimized',
                  '-Dc_args=-fsanitize=fuzzer-no-link'], 'clang'):
        return
    found = sorted(p for p in glob.glob('build-fuzz/tests/fuzz/fuzz-*') if os.path.isfile(p) and os.access(p, os.X_OK))
    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        for name, ok, out in pool.map(lambda p: fuzz_one(p, seconds), found):
            count.add(PASS if ok else FAIL, 'build-fuzz ' + name)
            runs = re.search(r'number_of_executed_units:\s*(\d+)', out)
            say('  %s: %s inputs in %d s%s' % (name, runs.group(1) if runs else '?', seconds, '' if ok else ', FAILED'))
            if not ok:
                print_log(name, out)


ASAN_ENV = {
    'ASAN_OPTIONS': 'detect_leaks=1:abort_on_error=0:detect_stack_use_after_return=0:strict_string_checks=1',
    'UBSAN_OPTIONS': 'halt_on_error=1:print_stacktrace=1',
    'LSAN_OPTIONS': 'suppressions=' + os.path.abspath('tests/lsan.supp'),
}


def check(count):
    if build(count, 'build-asan', ['-Db_sanitize=address,undefined', '-Db_lundef=false'], 'gcc'):
        meson_tests(count, 'build-asan', ['--no-suite', 'long', '--timeout-multiplier', '3'], ASAN_ENV)
    fuzz(count, int(os.environ.get('FARPAGE_FUZZ_SECONDS', '5')))


def tsan_wrapper():
    """Older thread sanitizers cannot cope with the kernel's wider address randomisation: run them without any."""
    argv = ['setarch', os.uname().machine, '-R']
    try:
        return ' '.join(argv) if subprocess.run(argv + ['true'], stderr=subprocess.DEVNULL).returncode == 0 else None
    except OSError:
        return None


LONG_BUDGET = int(os.environ.get('FARPAGE_LONG_SECONDS', '960'))


def long_today(count, where):
    """The tests of the suite `long` that run today: a ring, begun at another place each day, until the budget is used."""
    took = {}
    with open('tests/long') as f:
        for line in f:
            words = line.split('#')[0].split()
            if words:
                took[words[0]] = int(words[1])
    out = subprocess.run(['meson', 'test', '-C', where, '--no-rebuild', '--list', '--suite', 'long'], stdout=subprocess.PIPE,
                         stderr=subprocess.DEVNULL, text=True).stdout
    names = sorted(set(line.split(' / ')[-1].strip() for line in out.splitlines() if ' / ' in line))
    for name in names:
        if name not in took:
            count.add(FAIL, 'tests/long does not say how long %s takes' % name)
    day = int(os.environ.get('FARPAGE_LONG_DAY', time.time() // 86400))
    names = names[day % len(names):] + names[:day % len(names)] if names else []
    today, used = [], 0
    for name in names:
        if used + took.get(name, 60) <= LONG_BUDGET:
            today.append(name)
            used += took.get(name, 60)
    for name in names:
        if name not in today:
            say('waits for another day (FARPAGE_LONG_SECONDS=7200 runs all): %s, %d s' % (name, took.get(name, 60)))
    return today


def check_long(count):
    if build(count, 'build-clang', ['-Dwerror_tsa=true', '-Db_lundef=false'], 'clang'):
        count.add(PASS, 'build-clang: -Wthread-safety finds nothing')
    if build(count, 'build-tsan', ['-Db_sanitize=thread', '-Db_lundef=false'], 'clang'):
        args = ['--no-suite', 'long', '--timeout-multiplier', '6']
        for suite in ('unit', 'contract', 'model', 'region', 'wire', 'crash'):
            args += ['--suite', suite]
        supp = os.path.abspath('tests/tsan.supp')
        meson_tests(count, 'build-tsan', args, {'TSAN_OPTIONS': 'halt_on_error=1:second_deadlock_stack=1:suppressions=' + supp},
                    tsan_wrapper())
    if build(count, 'build-asan', ['-Db_sanitize=address,undefined', '-Db_lundef=false'], 'gcc'):
        today = long_today(count, 'build-asan')
        if today:
            meson_tests(count, 'build-asan', ['--suite', 'long', '--timeout-multiplier', '3'] + today,
                        dict(ASAN_ENV, FARPAGE_LONG='1'))
    fuzz(count, int(os.environ.get('FARPAGE_FUZZ_SECONDS', '40')))


def main():
    count = Count()
    began = time.time()
    try:
        {'check': check, 'check-long': check_long}[sys.argv[1]](count)
    except KeyboardInterrupt:
        count.add(FAIL, 'stopped by a signal')
    say()
    for name, reason in count.skips:
        say('skipped: %s: %s' % (name, reason))
    for name in count.failed:
        say('FAILED: %s' % name)
    say('%s took %.0f s' % (sys.argv[1], time.time() - began))
    say(count.closing())
    return 1 if count.n[FAIL] or not count.n[PASS] else 0


sys.exit(main())
