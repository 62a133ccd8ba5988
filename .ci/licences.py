"""The licence of every installed package, as the package states it: first of what users install, then of what only
developers do. Exits with 1 if a licence is unknown, or not among those that everyone may use, commercially too."""
import re, sys
from importlib.metadata import distribution, distributions
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

free = {s.lower() for s in ( # as SPDX says it, then as older packages do
    '0BSD','Apache-2.0','BSD-2-Clause','BSD-3-Clause','BSL-1.0','CC0-1.0','CNRI-Python','ISC','MIT','MIT-0','MIT-CMU',
    'MPL-2.0','PSF-2.0','Unlicense','Zlib','any-OSI',
    '3-Clause BSD License','Apache 2.0','Apache 2.0 License','Apache License, Version 2.0','Apache Software License',
    'BSD','BSD License','ISC License (ISCL)','MIT License','MIT licensed, as found in the LICENSE file',
    'Mozilla Public License 2.0 (MPL 2.0)','Python Software Foundation License')}
nvidia = 'closed, but free to use and to pass on: the CUDA libraries of the Linux builds of torch'

def licence(package):
    "What a package says of its licence: an SPDX expression, a classifier, or the first line of its own words"
    said = package.metadata
    classes = [c.split(' :: ')[-1] for c in said.get_all('Classifier', []) if c.startswith('License :: ')]
    classes = [c for c in classes if c!='OSI Approved']
    words = (said['License'] or '').strip().split('\n')[0]
    return said['License-Expression'] or '; '.join(classes) or words or 'UNKNOWN'

def is_free(text):
    "Of an expression each part joined by AND, and one of those joined by OR, has to be"
    known = lambda p: p.lower() in free or p.strip(' ()').lower() in free
    parts = re.split(r'; | AND ', re.sub(r' WITH [\w.-]+-exception', '', text))
    return all(known(part) or any(map(known, part.split(' OR '))) for part in parts)

def needs(name, extra='', seen=()):
    "All (package, extra) that a package needs"
    seen = {*seen, (canonicalize_name(name), extra)}
    for r in map(Requirement, distribution(name).requires or []):
        if r.marker and not r.marker.evaluate({'extra': extra}): continue
        for e in ('', *r.extras):
            if (canonicalize_name(r.name), e) not in seen: seen |= needs(r.name, e, seen)
    return seen

def main():
    packages = {canonicalize_name(d.metadata['Name']): d for d in distributions()}
    users,wrong = {name for name,_ in needs('attn_diversity')},[]
    for title,names in (('What users install', users & packages.keys()),
                        ('What only developers install', packages.keys()-users)):
        print(f'{title}: {len(names)} packages')
        for name in sorted(names):
            said = licence(packages[name])
            theirs = re.match(r'nvidia-|cuda-toolkit$', name)
            print(f"  {name} {packages[name].version}: {nvidia if theirs else said}")
            if not theirs and not is_free(said): wrong.append(f'{name} ({said})')
    if wrong: raise SystemExit(f"Not known as free to use: {', '.join(wrong)}. Read its licence: add its name to "
                               '.ci/licences.py if everyone may use it, commercially too, or do without the package.')

if __name__=='__main__': sys.exit(main())
