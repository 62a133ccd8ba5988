"""Make the site in _docs: the notebooks as nbdev processes them, mended, then Quarto where there is one and smalldocs
where there is none. No notebook is run."""
import html, json, os, re, shutil, subprocess, sys
from pathlib import Path
import yaml

root = Path(__file__).resolve().parent.parent
proc,docs = root/'_proc',root/'_docs'
site_url = lambda: yaml.safe_load((proc/'nbdev.yml').read_text(encoding='utf-8'))['website']['site-url']+'/'

not_found = """---
title: This page is not here
description: It may have had another name
---

The course begins at [its home page]({home}index.html), which lists every part of it. Or search: the box is at the top.
"""

def anchor(heading):
    "The id that Pandoc makes of a heading"
    return re.sub(r'^[^a-z]+', '', re.sub(r'[^\w.\- ]', '', heading.lower()).replace(' ', '-'))

def texts(nb):
    "Every Markdown text of a notebook, with a function that replaces it"
    for c in nb['cells']:
        if c['cell_type']=='markdown': yield ''.join(c['source']), lambda s, c=c: c.update(source=s)
        for o in c.get('outputs', []):
            d = o.get('data', {})
            if 'text/markdown' in d: yield ''.join(d['text/markdown']), lambda s, d=d: d.update({'text/markdown': s})

def one_line(source):
    "Alternative text in one line: of an option with several lines nbdev keeps only those that look like an option"
    def joined(m):
        text = ' '.join(re.sub(r'^#\|', '', m[1], flags=re.M).split())
        return f'#| fig-alt: {json.dumps(text, ensure_ascii=False)}\n'
    return re.sub(r'^#\| fig-alt: >-\n((?:#\|   .*\n)+)', joined, source, flags=re.M)

def process():
    """Processed notebooks in _proc. nbdev links every name in backticks: links that lead nowhere, and links inside
    code, become plain again"""
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    import nbdev.process as nbp
    read = nbp.extract_directives
    def with_whole_alt(cell, *args, **kwargs):
        if cell.cell_type=='code': cell.source = one_line(cell.source)
        return read(cell, *args, **kwargs)
    refresh_quarto_yml()
    nbp.extract_directives = with_whole_alt
    try: proc_nbs(n_workers=0, force=True) # what an older version of this file made is never taken for new
    finally: nbp.extract_directives = read
    # its first line is the page's title already
    log = (root/'CHANGELOG.md').read_text(encoding='utf-8').partition('\n')[2]
    page = (root/'nbs'/'changelog.qmd').read_text(encoding='utf-8')
    page = page.replace('{{< include ../CHANGELOG.md >}}', log)
    (proc/'changelog.qmd').write_text(page, encoding='utf-8')
    for f in list(proc.rglob('*')): # sources that have gone
        ours = f.suffix in ('.ipynb','.qmd','.png','.webp','.svg','.js') and '_docs' not in f.parts
        if ours and not (root/'nbs'/f.relative_to(proc)).exists(): f.unlink()
    (proc/'404.qmd').write_text(not_found.format(home=site_url()), encoding='utf-8')
    nbs = {f: json.loads(f.read_text(encoding='utf-8')) for f in proc.rglob('*.ipynb')}
    heads = lambda nb: (h for t,_ in texts(nb) for h in re.findall(r'^#+ (.+)$', t, flags=re.M))
    there = {page_name(nb, f): {anchor(h) for h in heads(nb)} for f,nb in nbs.items()}
    def plain(m):
        page,_,name = m[2].removeprefix(site_url()).partition('#')
        return m[0] if name in there.get(page, {name}) else m[1]
    link = r'\[(`[^`\n]+`)\]\(({}[^)\s]*)\)'.format(re.escape(site_url()))
    for f,nb in nbs.items():
        for c in nb['cells']: # what only loads a model or photographs that few have is folded
            code = ''.join(c['source'])
            if c['cell_type']=='code' and not c.get('outputs') and '../shared/' in code and 'code-fold' not in code:
                c['source'] = '#| code-fold: true\n#| code-summary: "Set up: the model and the photographs"\n'+code
        for t,put in texts(nb):
            parts = re.split(r'(^```.*?^```$)', t, flags=re.M|re.S)
            put(''.join(re.sub(link, r'\1', p) if p.startswith('```') else re.sub(link, plain, p) for p in parts))
        f.write_text(json.dumps(nb, indent=1, ensure_ascii=False)+'\n', encoding='utf-8')

def page_name(nb, f):
    "Where a page of the site lies: nbdev drops the numbers of notebooks"
    name = re.search(r'^output-file: (.+)$', ''.join(nb['cells'][0]['source']), flags=re.M)
    return (f.relative_to(proc).parent/(name[1] if name else f.with_suffix('.html').name)).as_posix()

def formula(m):
    "LaTeX to MathML, which browsers show without a script from elsewhere"
    from latex2mathml.converter import convert
    kind,tex = m[1],html.unescape(m[2])
    made = convert(tex, display='block' if kind=='display' else 'inline')
    return f'<span class="math {kind}" title="{html.escape(tex)}">{made}</span>'

def smalldocs():
    """What smalldocs lacks beside Quarto: nbdev's file names, links to the site's own address that work from any
    address, formulas without a network"""
    try: import smalldocs.site as sd
    except ImportError as e:
        raise SystemExit('make docs wants Quarto (https://quarto.org) or smalldocs, which `make install` '
                         'brings for Python 3.11 and later.') from e
    known = ('output-file is not read', 'format.html.grid') # only for Quarto
    for w in sd.build(proc, quiet=True).warnings:
        if not any(k in w for k in known): print('warning:', w, file=sys.stderr)
    load = lambda f: json.loads(f.read_text(encoding='utf-8'))
    names = {f.relative_to(proc).with_suffix('.html').as_posix(): page_name(load(f), f)
             for f in proc.rglob('*.ipynb')}
    names = {a:b for a,b in names.items() if a!=b}
    old_names = re.compile(r'(?<=["/])('+'|'.join(re.escape(a) for a in names)+r')(?=["#])')
    for f in list((proc/'_docs').rglob('*')):
        if f.suffix not in ('.html','.json','.xml') or 'site_libs' in f.parts: continue
        t = f.read_text(encoding='utf-8')
        up = '../'*(len(f.relative_to(proc/'_docs').parts)-1)
        renamed = lambda m: m[1]+names.get(m[2], m[2])+m[3]
        if f.suffix=='.xml': t = re.sub(r'(<loc>[^<]*/)(\S+?)(</loc>)', renamed, t)
        else: t = old_names.sub(lambda m: names[m[1]], t)
        if f.suffix=='.html':
            t = re.sub(f'(content="{re.escape(site_url())})[^"]*/(?=images/)', r'\1', t) # the social card's picture
            t = t.replace(f'href="{site_url()}', f'href="{up}')
            t = re.sub(r'<(link|script)[^>]*katex[^>]*>(</script>)?', '', t)
            t = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', formula, t, flags=re.S)
        name = f.relative_to(proc/'_docs').as_posix()
        f.unlink()
        (proc/'_docs'/names.get(name, name)).write_text(t, encoding='utf-8')

def build(quarto=None):
    "The site, made by Quarto (True), by smalldocs (False) or by what there is (None)"
    process()
    if (proc/'_docs').exists(): shutil.rmtree(proc/'_docs')
    if quarto or (quarto is None and shutil.which('quarto')):
        subprocess.run(['quarto','render',proc,'--no-execute'], check=True)
    else: smalldocs()
    if docs.exists(): shutil.rmtree(docs)
    shutil.move(proc/'_docs', docs)

if __name__=='__main__':
    os.chdir(root)
    build({'quarto': True, 'smalldocs': False}.get(sys.argv[1] if len(sys.argv)>1 else ''))
    print(f"{len(list(docs.rglob('*.html')))} pages in _docs: open _docs/index.html, "
          "or for the search `python -m http.server -d _docs`")
