"""What only a GPU can say, in one command and some ten minutes: `make gpu`. Each part is a process of its own with a
time limit, so that one that fails or hangs takes nothing from the others; what they find is in one folder: report.md.

`--rehearse` runs every branch on the CPU with a small ViT, in a few minutes: its numbers mean nothing."""
import argparse, json, os, platform, re, signal, subprocess, sys, time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
SECONDS = dict(cells=120, inference=150, training=90, compiled=180, latency=120, train=200, evidence=240)
ABOUT = dict(
    cells='cells of the notebooks that need a GPU (`#| cuda`)',
    inference='images/s and peak memory in inference, all methods at what variance costs, in turn with timm',
    training='the same for training steps',
    compiled='inference with torch.compile, keep rate 0.7',
    latency='one image at a time with CUDA graphs (torch.compile, reduce-overhead)',
    train='attn_diversity_train on digits: bfloat16, averaged weights, two loader processes, stopped and resumed',
    evidence='a probe of a frozen ViT on photographs')

def setting(rehearse):
    "(device, arch, {image size: keep rates}, batch size, seconds a model)"
    if rehearse: return 'cpu', 'vit_tiny_patch16_224', {64: (.7,)}, 2, .05
    return 'cuda', 'deit_small_patch16_224', {224: (.9,.7,.5,.3), 384: (.7,.5)}, 256, .5

def models_of(arch, size, rates, device, methods=('variance','evit','tome','fold','dynamicvit')):
    "timm's ViT, and every method at what variance costs at each keep rate; they share the weights"
    import timm
    from attn_diversity.measure import count_flops
    from attn_diversity.methods import match_flops, reduce_vit, twin_of
    vit = timm.create_model(arch, img_size=size, num_classes=100).eval().to(device)
    models = {'unpruned': vit}
    for rate in rates:
        price = float(count_flops(reduce_vit(twin_of(vit), keep_rate=rate)))
        for m in methods:
            models[f'{m} {rate:g}'] = reduce_vit(twin_of(vit), m, **match_flops(vit, price, m)).eval()
    return models

def tables(out, name, rehearse, rates=None, batch=None, **how):
    "Times models of each image size, and writes NAME.csv after each"
    import pandas as pd
    from attn_diversity.bench import speed_table
    device,arch,sizes,batch_size,seconds = setting(rehearse)
    found = []
    for size,own in sizes.items():
        models = models_of(arch, size, rates or own, device)
        if how.get('compile') and rehearse: models = dict(list(models.items())[:2]) # a minute's compiling each
        amp = None if rehearse and how.get('compile') else 'bfloat16'
        t = speed_table(models, batch or batch_size, seconds=seconds, amp=amp, **how)
        found.append(t)
        pd.concat(found).to_csv(out/f'{name}.csv', index=False)
        print(t.drop(columns=['image size','batch size']).round(2).to_string(index=False))
        how_measured = ', '.join(f'{k} {v}' for k,v in t.attrs.items())
        print(f'{size} px, batch {t["batch size"].iloc[0]}, {how_measured}', flush=True)

def inference(out, rehearse): tables(out, 'inference', rehearse)
def training(out, rehearse): tables(out, 'training', rehearse, (.7,), training=True)
def compiled(out, rehearse): tables(out, 'compiled', rehearse, (.7,), compile=True)
def latency(out, rehearse): tables(out, 'latency', rehearse, (.7,), 1, compile='reduce-overhead')

def cells(out, rehearse):
    "Notebooks with cells for a GPU; without one, only which they are"
    flagged = [f for f in sorted((root/'nbs').rglob('*.ipynb')) if any(
        re.search(r'^#\|\s*cuda', ''.join(c['source']), re.M) for c in json.loads(f.read_text())['cells'])]
    print('notebooks:', *(f.name for f in flagged), flush=True)
    flags = [] if rehearse else ['--flags','cuda']
    some = flagged[:1] if rehearse else flagged
    sys.exit(subprocess.run([sys.executable, root/'.ci'/'notebooks.py', *flags, *some], cwd=root).returncode)

def digits(folder, side):
    "The digits as a folder of pictures"
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    data = load_digits()
    for i,(image,y) in enumerate(zip(data.images, data.target)):
        (folder/str(y)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((255*image/16).astype(np.uint8)).resize((side,side)).save(folder/str(y)/f'{i}.png')
    return folder

def train(out, rehearse):
    "A training that is stopped after a while, as a queue would stop it, and goes on"
    device,arch,sizes,batch,_ = setting(rehearse)
    size,epochs,after = (32,6,16) if rehearse else (64,20,40)
    command = [sys.executable, '-m', 'attn_diversity', 'train', digits(out/'digits', size), '--arch', arch, '--scratch',
               '--img_size', size, '--epochs', epochs, '--batch_size', 32 if rehearse else batch, '--ema', .99,
               '--amp', 'none' if rehearse else 'bfloat16', '--n_workers', 2, '--lr', 3e-4, '--out', out/'run']
    first = subprocess.Popen(list(map(str, command)))
    try:
        if first.wait(after): sys.exit('The training failed before it was stopped.')
    except subprocess.TimeoutExpired:
        first.send_signal(signal.SIGTERM)
        print(f'stopped after {after} s: exit {first.wait(60)}', flush=True)
        subprocess.run([*map(str, command), '--resume'], check=True)
    print((out/'run'/'history.csv').read_text())
    print((out/'run'/'model.json').read_text())

def evidence(out, rehearse):
    "Every method at one cost on the photographs that there are, or on digits"
    import timm, torch
    from attn_diversity.attention import example_vit
    from attn_diversity.evidence import probe, probe_runs
    device,shared = setting(rehearse)[0],root.parent/'shared'
    weights,folder = shared/'models'/'vit_small_patch14_saliency.safetensors',shared/'data'/'flowers'
    if rehearse or not weights.is_file() or not folder.is_dir():
        print('a ViT with random weights, on digits: no weights and photographs beside the project, or a rehearsal')
        torch.manual_seed(0)
        model = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=4, num_classes=0, depth=6)
        folder = digits(out/'digits', 32)
    else: model = example_vit(weights)
    runs = probe_runs(model, keep_rates=(.5,), methods=('variance','fold') if rehearse else ('variance','tome','fold'))
    table,_ = probe(model.eval().to(device), folder, out/'probe', runs)
    print(table[['run','question','GFLOPs','accuracy','lost','lost low','lost high']].round(2).to_string(index=False))

def environment():
    "What it ran on"
    import timm, torch
    about = dict(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__,
                 cores=os.cpu_count(), cuda=torch.version.cuda)
    for i in range(torch.cuda.device_count()): about[f'GPU {i}'] = torch.cuda.get_device_name(i)
    return ', '.join(f'{k} {v}' for k,v in about.items())

def run_part(name, out, rehearse):
    "(state, seconds) of a part in a process of its own; what it printed is in NAME.log"
    command = [sys.executable, __file__, '--part', name, '--out', out, *(['--rehearse'] if rehearse else [])]
    begun = time.time()
    with open(out/f'{name}.log', 'w') as log:
        p = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try: state = f'failed, exit {p.returncode}' if p.wait(SECONDS[name]) else 'ok'
        except subprocess.TimeoutExpired:
            state = f'stopped after {SECONDS[name]} s'
        try: os.killpg(p.pid, signal.SIGKILL) # its children, too
        except ProcessLookupError: pass
        p.wait()
    return state, time.time()-begun

def report(out, states, rehearse):
    "report.md: a line a part, then what each printed"
    lines = ['# attn_diversity on a GPU', '', environment()+'.', '']
    if rehearse: lines += ['**A rehearsal on the CPU with a small ViT: that all parts run is all that it says.**', '']
    lines += ['| part | what | state | seconds |', '|---|---|---|---|']
    lines += [f'| {n} | {ABOUT[n]} | {state} | {s:.0f} |' for n,(state,s) in states.items()]
    for n in states:
        said = (out/f'{n}.log').read_text(errors='replace').replace('\r', '\n').splitlines()
        said = [re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', s) for s in said if s.strip()]
        lines += ['', f'## {n}', '', '```', *said[-60:], '```']
    (out/'report.md').write_text('\n'.join(lines)+'\n')

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=Path('attn_diversity_gpu'), help='folder for report.md and tables')
    parser.add_argument('--rehearse', action='store_true', help='on the CPU, small')
    parser.add_argument('--part', choices=SECONDS, help='only this one, here')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part: return globals()[args.part](args.out, args.rehearse)
    if not args.rehearse:
        import torch
        if not torch.cuda.is_available():
            sys.exit('There is no GPU here: try --rehearse, which runs all parts on the CPU.')
    states = {}
    for name in SECONDS:
        print(f'{name}: {ABOUT[name]} ...', end=' ', flush=True)
        states[name] = run_part(name, args.out, args.rehearse)
        print(f'{states[name][0]}, {states[name][1]:.0f} s', flush=True)
        report(args.out, states, args.rehearse)
    print(f"{args.out/'report.md'} has it all.")
    sys.exit(any(s!='ok' for s,_ in states.values()))

if __name__=='__main__': main()
