"""The pictures of the site that no notebook shows: the moving one of the home page, the cards, the social card, the
icon. They are made of nbs/in_page/patches.js, which try_it.ipynb writes, and of the notebooks' own figures."""
import base64, io, json, sys
from pathlib import Path
import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps

root = Path(__file__).resolve().parent.parent
images = root/'nbs'/'images'
SIDE,PX = 16,336 # patches a row, pixels of a picture
grey,blue,orange = (190,190,190),(26,95,180),(194,65,12)
moving = ('flower','astronaut') # the photographs of the moving picture

figures = dict(idea=('00_attention',7), rivals=('08_tome',7), pays=('12_bench',1), eye=('15_vis',0),
               train=('21_teachers',0), trained=('24_choose',0), engine=('29_resume',0))
figures |= {f'tutorials/{n}': (f'tutorials/{n}',k) for n,k in dict(
    prune_your_own=0, photographs=1, imagenet100=0, reproduce_the_tables=0, compare=0, fold_taken_apart=0,
    evidence=0, does_it_keep_the_object=1, invent_an_indicator=1, explain_and_segment=1).items()}
chains = {'tutorials/life_of_a_model': ['photographs','train','choose','share'],
          'tutorials/export_and_serve': ['model','ONNX','server']}

def bits(text, k): # whole numbers of k bits each
    return [b>>k*i & (1<<k)-1 for b in base64.b64decode(text) for i in range(8//k)]

def groups(said, stage): # for each patch the first of its group after a stage, -1 if it was dropped
    if ' ' not in said: return [-1 if g<stage and g<3 else i for i,g in enumerate(bits(said, 2))]
    when,whom = said.split()
    at,to = bits(when, 4),base64.b64decode(whom)
    def first(i): return first(to[i]) if at[i]<stage else i
    return [first(i) for i in range(SIDE**2)]

def box(i, px=PX):
    x,y,c = i%SIDE*px//SIDE,i//SIDE*px//SIDE,px//SIDE
    return x,y,x+c-1,y+c-1

def drawn(photo, said, stage): # what is left of a photograph
    im = Image.open(io.BytesIO(base64.b64decode(photo['image']))).convert('RGB')
    small,out,of = im.resize((SIDE,SIDE), Image.BOX),im.copy(),groups(said, stage)
    d = ImageDraw.Draw(out)
    for g in set(of):
        ids = [i for i,v in enumerate(of) if v==g]
        if g<0: colour = grey
        elif len(ids)>1:
            seen = [small.getpixel((i%SIDE,i//SIDE)) for i in ids]
            colour = tuple(sum(c)//len(ids) for c in zip(*seen))
        else: continue
        for i in ids: d.rectangle(box(i), fill=colour)
    if ' ' in said:
        for i,g in enumerate(of):
            x,y,r,b = box(i)
            if i%SIDE and of[i-1]!=g: d.line((x,y,x,b), fill='white')
            if i>=SIDE and of[i-SIDE]!=g: d.line((x,y,r,y), fill='white')
    return out

def font(size, bold=False):
    name = 'DejaVuSans-Bold.ttf' if bold else 'DejaVuSans.ttf'
    return ImageFont.truetype(str(Path(matplotlib.get_data_path())/'fonts'/'ttf'/name), size)

def tokens_by_block(counts): # of 12 blocks that prune in 3, 6 and 9: what each of them works on after its attention
    return [counts[sum(b>=s for s in (3,6,9))] for b in range(12)]

def moving_svg(photos, said, counts, seconds=9):
    "Two photographs whose patches go, over a bar a block; it stands still for who wants no motion"
    at = lambda block: round(100*(.1+.07*block))
    names = [f'b{b}' for b in range(12)]
    css = [f'@keyframes s{b}{{0%,{at(b)}%{{opacity:0}}{at(b)+3}%,97%{{opacity:1}}100%{{opacity:0}}}}'
           f'.b{b}{{animation:s{b} {seconds}s linear infinite}}' for b in range(12)]
    css.append('@media (prefers-reduced-motion:reduce){*{animation:none!important}}')
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 440" role="img" aria-label="Patches leave in '
           f'blocks 3, 6 and 9"><style>{"".join(css)}text{{font:15px system-ui,sans-serif;text-anchor:middle}}</style>']
    for k,p in enumerate(photos):
        out.append(f'<g transform="translate({364*k})"><image width="{PX}" height="{PX}" '
                   f'href="data:image/webp;base64,{p["image"]}"/>')
        gone = bits(said[k], 2)
        for s,b in enumerate((3,6,9)):
            c = PX//SIDE
            path = ''.join(f'M{i%SIDE*c} {i//SIDE*c}h{c}v{c}h-{c}z' for i,g in enumerate(gone) if g==s)
            out.append(f'<path class="b{b}" fill="rgb{grey}" d="{path}"/>')
        out.append('</g>')
    for b,n in enumerate(tokens_by_block(counts)):
        h,x = n/256*80,b*58.6
        out.append(f'<rect x="{x:.1f}" y="{435-h:.1f}" width="54" height="{h:.1f}" rx="3" fill="#8884"/>'
                   f'<g class="{names[b]}"><rect x="{x:.1f}" y="{435-h:.1f}" width="54" height="{h:.1f}" rx="3" '
                   f'fill="rgb{blue}"/><text x="{x+27:.1f}" y="428" fill="#fff">{n}</text></g>')
    return ''.join(out)+'</svg>\n'

def frames(photos, said, counts, background='white'): # the same as pictures, a frame a stage
    for stage,upto in enumerate((0,4,7,12)):
        im = Image.new('RGB', (700,440), background)
        for k,p in enumerate(photos): im.paste(drawn(p, said[k], stage), (364*k,0))
        d = ImageDraw.Draw(im)
        for b,n in enumerate(tokens_by_block(counts)):
            h,x = n/256*80,b*58.6
            d.rounded_rectangle((x,435-h,x+54,435), 3, fill=blue if b<upto else (225,225,225))
            if b<upto: d.text((x+27,422), str(n), fill='white', font=font(15), anchor='mm')
        yield im

def figure(name, k): # the k-th picture of a notebook
    nb = json.loads((root/'nbs'/f'{name}.ipynb').read_text(encoding='utf-8'))
    shown = [o.get('data', {}) for c in nb['cells'] for o in c.get('outputs', [])]
    found = [d.get('image/png') or d.get('image/jpeg') for d in shown]
    found = [f for f in found if f]
    return Image.open(io.BytesIO(base64.b64decode(''.join(found[k])))).convert('RGB')

def chain(words, size=(480,270)): # words in boxes, with arrows between them
    im = Image.new('RGB', size, 'white')
    d,n,w = ImageDraw.Draw(im),len(words),size[0]
    step = w/n
    for i,word in enumerate(words):
        x = step*(i+.5)
        d.rounded_rectangle((x-step*.43,105,x+step*.43,165), 8, outline=blue, width=3)
        d.text((x,135), word, fill=(30,30,30), font=font(15 if n>3 else 20), anchor='mm')
        if i: d.line((step*i-step*.07,135,step*i+step*.07,135), fill=orange, width=4)
    return im

def card(im, size=(480,270), edge=8): # the whole picture on white
    inner = ImageOps.contain(im, (size[0]-2*edge,size[1]-2*edge), Image.LANCZOS)
    out = Image.new('RGB', size, 'white')
    out.paste(inner, ((size[0]-inner.width)//2,(size[1]-inner.height)//2))
    return out

def social(photos, said): # 1200 x 630, what a link to the site shows
    im = Image.new('RGB', (1200,630), 'white')
    for k,p in enumerate(photos):
        for j,stage in enumerate((0,3)):
            im.paste(drawn(p, said[k], stage).resize((285,285)), (594+(285+12)*j,24+297*k))
    d = ImageDraw.Draw(im)
    d.text((48,150), 'attn_diversity', fill=blue, font=font(58, True))
    for i,line in enumerate(('Faster vision transformers:','drop the patches on which','the attention heads agree')):
        d.text((48,260+50*i), line, fill=(30,30,30), font=font(34))
    d.text((48,450), 'a course that exports a library', fill=(90,90,90), font=font(28))
    return im

favicon = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="6" '
           'fill="#1a5fb4"/><g fill="#fff"><path d="M11 6h9v9h9v9h-9v-9h-9z"/></g><g fill="#fff" opacity=".3">'
           '<path d="M3 6h7v8H3zM21 6h8v8h-8zM3 15h7v9H3zM11 16h8v8h-8z"/></g></svg>\n')

def main():
    text = (root/'nbs'/'in_page'/'patches.js').read_text(encoding='utf-8')
    data = json.loads(text.removeprefix('window.patchData = '))
    k = data['rates'].index(.7)
    by_name = {p['name']: p for p in data['photos']}
    photos = [by_name[n] for n in moving]
    said,counts = [p['methods']['variance'][k] for p in photos],data['counts']['variance'][k]
    (images/'moving.svg').write_text(moving_svg(photos, said, counts), encoding='utf-8')
    first,*more = frames(photos, said, counts)
    first.save(images/'moving.webp', save_all=True, append_images=more, duration=[1200,900,900,2500], loop=0,
               quality=70)
    flower = by_name['flower']
    strip = Image.new('RGB', (700,350), 'white')
    for i,m in enumerate(data['titles']):
        strip.paste(drawn(flower, flower['methods'][m][k], 3).resize((168,168)), (177*i,0))
    strip.crop((0,0,699,168)).save(images/'try_it.webp', quality=80)
    social(photos, said).save(images/'card.png', optimize=True)
    (images/'favicon.svg').write_text(favicon, encoding='utf-8')
    made = {name: card(figure(nb, n)) for name,(nb,n) in figures.items()}
    made |= {name: chain(words) for name,words in chains.items()}
    for name,im in made.items(): im.save(images/'cards'/f"{name.split('/')[-1]}.webp", quality=80)
    sizes = {f.name: f.stat().st_size//1000 for f in sorted(images.rglob('*')) if f.is_file()}
    print('kB:', sizes, file=sys.stderr)

if __name__=='__main__': main()
