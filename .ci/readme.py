"Make README.md from nbs/index.ipynb as nbdev processes it, by nbconvert: `nbdev_readme` wants Quarto."
import re, sys
from pathlib import Path
import nbformat, yaml
from nbconvert import MarkdownExporter
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

root = Path(__file__).resolve().parent.parent

def prefer_markdown(nb):
    "Some cells answer in HTML for the site, and in Markdown for here, where no style and no script runs"
    for c in nb.cells:
        for o in c.get('outputs', []):
            if 'text/markdown' in o.get('data', {}): o.data.pop('text/html', None)
    return nb

def readme():
    "The README's text, and its pictures by file name"
    refresh_quarto_yml()
    proc_nbs(n_workers=0)
    nb = nbformat.read(root/'_proc'/'index.ipynb', as_version=4)
    nb.metadata['language_info'] = dict(name='python') # for the code fences
    front = yaml.safe_load(nb.cells.pop(0).source.strip().strip('-')) # nbdev makes it of the title and the line below
    for c in nb.cells: # directives that only Quarto acts on
        if c.cell_type!='code': continue
        c.source = '' if 'echo: false' in c.source else re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
    resources = dict(output_files_dir='index_files', unique_key='index')
    text,found = MarkdownExporter().from_notebook_node(prefer_markdown(nb), resources=resources)
    text = re.sub(r'```\w*\s*```\n', '', text) # the hidden code's
    text = f"# {front['title']}\n\n> {front['description']}\n\n{text.strip()}\n"
    return re.sub(r'\n\s*\n\s*\n+', '\n\n', text), found['outputs']

if __name__=='__main__':
    text,pictures = readme()
    (root/'README.md').write_text(text, encoding='utf-8')
    for old in (root/'index_files').glob('*'): old.unlink()
    for name,data in pictures.items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(data)
    print(f"README.md and {len(pictures)} picture(s)", file=sys.stderr)
