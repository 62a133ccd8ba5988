"Pictures, folders and settings that come from strangers: each is read as it should be, or refused in a sentence."
import errno, io, json, os, threading, warnings
from pathlib import Path
import numpy as np, pytest
from fastai.vision.all import PILImage
from PIL import EpsImagePlugin, Image
from attn_diversity.data import (cifar_dls, digits_dls, folder_dls, FORMATS, IMAGENET100, imagenet100_dls,
                                 open_picture, photograph, split_by_class, walk_tree)
from attn_diversity.prepare import loader_speed, prepare, suggest_workers

PROGRAM = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n{} loop\n'

def picture(i):
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (40,30,3), dtype=np.uint8))

def tree(root, **counts): # {class: number of pictures}
    for i,(name,n) in enumerate(counts.items()):
        (root/name).mkdir(parents=True)
        for j in range(n): picture(100*i+j).save(root/name/f'{name}{j}.jpg')
    return root

def load(*args, **kw): return folder_dls(*args, img_size=16, batch_size=2, n_workers=0, **kw)
def names(dls): return sorted(f.name for ds in (dls.train_ds, dls.valid_ds) for f in ds.items)

@pytest.fixture(scope='module')
def bomb():
    file = io.BytesIO()
    Image.new('1', (10_000,10_000)).save(file, 'PNG')
    return file.getvalue()

@pytest.fixture
def started(monkeypatch): # what Ghostscript would have been started for
    calls = []
    def ghostscript(*args, **kw):
        calls.append(args)
        raise OSError('not here')
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', ghostscript)
    return calls

# pictures

def test_no_program_is_run_and_no_bomb_decoded(tmp_path, bomb, started):
    root = tree(tmp_path/'photos', cat=4, dog=4)
    (root/'cat'/'program.jpg').write_bytes(PROGRAM)
    (root/'dog'/'huge.png').write_bytes(bomb)
    with pytest.warns(UserWarning, match='Left out 2 of 10') as caught: dls = load(root)
    said = str(caught[-1].message)
    assert 'cat/program.jpg (in no known format)' in said and 'dog/huge.png (10000 x 10000 pixels' in said
    assert {f.name for f in dls.left_out}=={'program.jpg','huge.png'} and len(names(dls))==8
    assert len(prepare(root, tmp_path/'small', short_side=20, n_workers=0)['left_out'])==2
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        unseen = load(root, verify=False) # believes the names, until the file's turn comes
        for name in ('program.jpg','huge.png'):
            f = next(f for ds in (unseen.train_ds, unseen.valid_ds) for f in ds.items if f.name==name)
            with pytest.raises(ValueError, match=rf'{name} cannot be read as an image .*(in no known|10000 x 10000)'):
                unseen.test_dl([f]).one_batch()
    assert not started
    with pytest.raises(OSError): Image.open(io.BytesIO(PROGRAM)).load() # Pillow alone would have
    assert started

def test_other_formats_are_not_opened():
    refused = set()
    for kind in {'EPS','PDF','PCX','IM','SGI','TGA','ICO','SPIDER'}:
        file = io.BytesIO()
        Image.new('L', (32,32)).save(file, kind)
        with pytest.raises(Image.UnidentifiedImageError): open_picture(file.getvalue())
        refused.add(kind)
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    with pytest.raises(Image.UnidentifiedImageError): open_picture(svg)
    assert len(refused)==8 and not refused & set(FORMATS)

def test_bound_of_pixels(bomb, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 99_999_999)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(Image.DecompressionBombError): open_picture(bomb)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100_000_000)
    assert open_picture(bomb).size==(10_000,10_000)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    assert open_picture(bomb).size==(10_000,10_000)

def test_bound_of_passes():
    file = io.BytesIO()
    picture(0).save(file, 'JPEG', progressive=True)
    whole,size = file.getvalue(),open_picture(file.getvalue()).size
    at = whole.rindex(b'\xff\xda')
    again = lambda n: whole[:-2]+whole[at:-2]*(n-whole.count(b'\xff\xda'))+whole[-2:]
    assert open_picture(again(100)).size==size
    with open_picture(again(20)) as im: assert im.convert('RGB').size==size
    with pytest.raises(Image.DecompressionBombError, match='101 scans'): open_picture(again(101))

def test_ordinary_pictures_are_as_fastai_reads_them(tmp_path): # the others are in test_pictures
    im = picture(0)
    im.save(tmp_path/'m.jpg', progressive=True)
    assert (np.asarray(photograph(tmp_path/'m.jpg'))==np.asarray(PILImage.create(tmp_path/'m.jpg'))).all()
    files = {'a.jpg': im, 'c.png': im.quantize(8), 'd.gif': im, 'f.jpg': im.convert('CMYK'), 'g.tif': im.convert('LAB'),
             'i.png': im.convert('1'), 'j.bmp': im, 'k.ppm': im}
    for name,o in files.items():
        o.save(tmp_path/name)
        ours,theirs = photograph(tmp_path/name),PILImage.create(tmp_path/name)
        assert type(ours) is type(theirs) and (np.asarray(ours)==np.asarray(theirs)).all(), name
    root = tree(tmp_path/'photos', cat=4, dog=4)
    dls,f = load(root),root/'cat'/'cat0.jpg'
    same = [f, str(f), f.read_bytes(), PILImage.create(f), np.asarray(PILImage.create(f))]
    x, = dls.test_dl(same, bs=len(same)).one_batch()
    assert all((o==x[0]).all() for o in x)

# folders

def test_linked_siblings_count_once(tmp_path):
    root = tree(tmp_path/'photos', a=20, b=20)
    (root/'a'/'more').symlink_to(root/'b')
    (root/'b'/'more').symlink_to(root/'a')
    (root/'a'/'self').symlink_to(root/'a')
    (root/'a'/'up').symlink_to(tmp_path)
    (root/'ring').symlink_to(root/'ring')
    assert prepare(root, tmp_path/'copy', n_workers=0)['images']==40
    dls = load(root)
    assert len(names(dls))==len(set(names(dls)))==40 and list(dls.vocab)==['a','b']
    copies = [f for f in (tmp_path/'copy').rglob('*.jpg')]
    assert sorted(f.name for f in copies)==names(dls) and all(f.parent.name==f.name[0] for f in copies)

def test_a_linked_folder_elsewhere_is_read_once(tmp_path):
    tree(tmp_path/'else', cat=3, dog=3)
    (tmp_path/'else'/'cat'/'back').symlink_to(tmp_path/'else'/'cat')
    root = tree(tmp_path/'photos', cat=2)
    (root/'dog').symlink_to(tmp_path/'else'/'dog')
    (root/'cat'/'one').symlink_to(tmp_path/'else'/'cat')
    (root/'cat'/'two').symlink_to(tmp_path/'else'/'cat')
    dls = load(root)
    assert len(names(dls))==prepare(root, tmp_path/'copy', n_workers=0)['images']==8
    assert {dls.vocab[y] for _,y in dls.train_ds}=={'cat','dog'}

def test_one_folder_is_not_two_classes_nor_both_parts(tmp_path):
    root = tree(tmp_path/'photos', cat=3, dog=3)
    (root/'wolf').symlink_to(root/'dog')
    with pytest.raises(ValueError, match='wolf and .*dog are the same folder'): load(root)
    (root/'wolf').unlink()
    (tmp_path/'both').mkdir()
    for part in ('train','val'): (tmp_path/'both'/part).symlink_to(root)
    with pytest.raises(ValueError, match='both/val and .*both/train are the same folder'): load(tmp_path/'both')
    (tmp_path/'both'/'val').unlink()
    for name in ('cat','dog'): tree(tmp_path/'both'/'val', **{name: 2})
    (tmp_path/'both'/'val'/'dog').rename(tmp_path/'dog')
    (tmp_path/'both'/'val'/'dog').symlink_to(root/'dog')
    with pytest.raises(ValueError, match='both/val/dog and .*both/train/dog are the same'): load(tmp_path/'both')

def test_a_folder_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    root = tree(tmp_path/'photos', cat=3, dog=3)
    (root/'cat'/'deep').mkdir()
    for locked in (root, root/'dog', root/'cat'/'deep'):
        access = lambda d, *args, locked=locked, **kw: Path(d)!=locked # root may read everything
        with monkeypatch.context() as m:
            m.setattr(os, 'access', access)
            for f in (load, cifar_dls, lambda r: prepare(r, tmp_path/'copy', n_workers=0)):
                with pytest.raises(PermissionError, match=f'{locked} may not be read'), warnings.catch_warnings():
                    warnings.simplefilter('ignore')
                    f(root)
    assert len(names(load(root)))==6

def test_odd_files_are_named(tmp_path):
    root = tree(tmp_path/'photos', cat=3, dog=3)
    os.mkfifo(root/'cat'/'pipe.jpg')
    (root/'dog'/'gone.jpg').symlink_to(tmp_path/'nowhere')
    def both():
        with pytest.warns(UserWarning, match='Left out 2 of 8'): assert len(names(load(root)))==6
        with pytest.warns(UserWarning, match='Left out 2 of 8'): assert len(names(load(root, verify=False)))==6
        assert set(prepare(root, tmp_path/'copy', n_workers=0)['left_out'])=={'cat/pipe.jpg','dog/gone.jpg'}
    t = threading.Thread(target=both, daemon=True) # a pipe that is opened is waited for
    errors = []
    threading.excepthook,hook = errors.append,threading.excepthook
    try:
        t.start()
        t.join(60)
    finally: threading.excepthook = hook
    assert not t.is_alive() and not errors, errors

# prepare's notes

def test_names_that_do_not_fit_a_line(tmp_path, capsys):
    odd = ['a\tb.png','c\nd.png','e\u2028f.png','"g".png','ä\r.png',os.fsdecode(b'h\xff.png')]
    (tmp_path/'photos').mkdir()
    for name in odd:
        picture(0).convert('LA').save(tmp_path/'photos'/name)
        (tmp_path/'photos'/f'{name}.jpg').write_text('no picture')
    for there in (0, len(odd), len(odd)):
        made = prepare(tmp_path/'photos', tmp_path/'copy', n_workers=0)
        assert made['there']==there and set(made['left_out'])=={f'{n}.jpg' for n in odd}
        assert made['converted']=={n if n.isprintable() else repr(n)[1:-1]: 'LA' for n in odd}
    assert {f.name for f in (tmp_path/'copy').glob('*.png')}==set(odd)
    for note in ('left_out.txt','converted.txt'):
        lines = (tmp_path/'copy'/note).read_text(encoding='utf-8').splitlines()
        assert len(lines)==len(odd) and all(line.count('\t')==1 for line in lines)
    assert r'a\tb.png (LA)' in capsys.readouterr().out

def test_long_names(tmp_path):
    (tmp_path/'photos').mkdir()
    picture(0).save(tmp_path/'photos'/('a'*250+'.png'))
    picture(1).save(tmp_path/'photos'/('b'*250+'.bmp'))
    made = prepare(tmp_path/'photos', tmp_path/'copy', n_workers=0)
    assert made['copied']==1 and ['too long' in why for why in made['left_out'].values()]==[True]

@pytest.mark.parametrize('text', ['', '{"short_side": 2', '['*100_000, b'\xff\xfe'])
def test_a_damaged_note_is_named(text, tmp_path):
    root = tree(tmp_path/'photos', cat=2)
    prepare(root, tmp_path/'copy', n_workers=0)
    note = tmp_path/'copy'/'prepare.json'
    note.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match='prepare.json is damaged') as e: prepare(root, tmp_path/'copy', n_workers=0)
    note.write_text(str(e.value).partition('write ')[2].partition(' into')[0]) # as it says
    assert prepare(root, tmp_path/'copy', n_workers=0)['there']==2

def test_cut_line_of_a_note(tmp_path):
    (tmp_path/'photos').mkdir()
    picture(0).convert('LA').save(tmp_path/'photos'/'a.png')
    prepare(tmp_path/'photos', tmp_path/'copy', n_workers=0)
    with (tmp_path/'copy'/'converted.txt').open('a') as f: f.write('b.p')
    assert prepare(tmp_path/'photos', tmp_path/'copy', n_workers=0)['converted']=={'a.png': 'LA'}

def test_full_disk_names_what_was_written(tmp_path, monkeypatch):
    root = tree(tmp_path/'photos', cat=2)
    def full(self, data): raise OSError(errno.ENOSPC, 'No space left on device')
    prepare(root, tmp_path/'copy', n_workers=0)
    (tmp_path/'copy'/'cat'/'cat1.jpg').unlink()
    before = json.loads((tmp_path/'copy'/'prepare.json').read_text())
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match='No space left'): prepare(root, tmp_path/'copy', n_workers=0)
    assert json.loads((tmp_path/'copy'/'prepare.json').read_text())==before

# settings

SETTINGS = [('img_size', 0), ('img_size', 16.), ('img_size', True), ('batch_size', 0), ('batch_size', 'two'),
            ('valid_pct', 2), ('valid_pct', 0), ('valid_pct', float('nan')), ('valid_pct', '.2'), ('seed', -1),
            ('seed', 1.5), ('seed', None), ('n_workers', -1), ('n_workers', 1.5), ('n_workers', 10**9)]

@pytest.mark.parametrize('name,value', SETTINGS)
def test_settings_are_refused_in_a_sentence(name, value, tmp_path):
    for s in IMAGENET100: (tmp_path/'train'/s).mkdir(parents=True)
    for f in (folder_dls, cifar_dls, imagenet100_dls, lambda _, **kw: digits_dls(**kw)):
        if f.__name__=='<lambda>' and name=='n_workers': continue # the digits have none
        with pytest.raises(ValueError, match=rf'{name}={value!r}.*must'): f(tmp_path, **{name: value})

@pytest.mark.parametrize('name,value', [('short_side', 0), ('short_side', 1.5), ('quality', 96), ('quality', 0),
                                        ('n_workers', -1), ('n_workers', '2')])
def test_settings_of_prepare(name, value, tmp_path):
    with pytest.raises(ValueError, match=f'{name}={value!r}: it must be at least'):
        prepare(tree(tmp_path/'photos', cat=1), tmp_path/'copy', **{name: value})
    assert not (tmp_path/'copy').exists()

def test_settings_of_the_measurement():
    dls = digits_dls(batch_size=8)
    with pytest.raises(ValueError, match='n_workers=-1: it must'): loader_speed(dls, -1)
    for seconds in (0, -1, float('inf'), float('nan'), '3'):
        with pytest.raises(ValueError, match='seconds=.*above 0'): loader_speed(dls, 0, seconds)
    for target in (0, -5, float('nan')):
        with pytest.raises(ValueError, match='target=.*above 0'): suggest_workers(dls, target)

def test_nothing_to_validate_with(tmp_path):
    with pytest.raises(ValueError, match='nothing to validate with'): load(tree(tmp_path/'ones', cat=1, dog=1))
    few = tree(tmp_path/'few', cat=4, dog=1)
    with pytest.warns(UserWarning, match='Only one readable image of class dog'): dls = load(few)
    assert (len(dls.train_ds), len(dls.valid_ds))==(4,1)
    with pytest.raises(ValueError, match='nothing to split'): split_by_class([])

def test_more_digits_a_batch_than_there_are():
    with pytest.warns(UserWarning, match='Only 1438 images to train on'): dls = digits_dls(batch_size=5000)
    assert [len(x) for x,_ in dls.train]==[1438] # fastai would have dropped it, and trained on nothing

def test_walk_leaves_out_what_is_hidden_and_what_is_taken_out(tmp_path):
    for f in ('a/x', 'a/.y', '.h/z', 'b/c/w'):
        (tmp_path/f).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/f).touch()
    (tmp_path/'link').symlink_to(tmp_path/'.h') # what is hidden is read, where a link shows it
    assert [str((h/f).relative_to(tmp_path)) for h,_,fs in walk_tree(tmp_path) for f in fs]==['a/x','b/c/w','link/z']
    seen = []
    for here,dirs,_ in walk_tree(tmp_path):
        seen.append(here.name)
        dirs[:] = [d for d in dirs if d!='b']
    assert seen[1:]==['a','link']
