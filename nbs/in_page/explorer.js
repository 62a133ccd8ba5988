// The explorer in the page: draws what patches.js (written by try_it.ipynb) holds. No library, no server.
(() => {
  const data = window.patchData
  if (!data) return
  const side = 16, n = side*side, px = 336, cell = px/side // patches a row; pixels of a picture and of a patch
  const stages = ['the start','block 3','block 6','block 9','block 11, the last']
  const methods = Object.keys(data.titles), merges = m => data.photos[0].methods[m][0].includes(' ')
  const bytes = s => Uint8Array.from(atob(s), c => c.charCodeAt(0))
  const bits = (s, k) => { // whole numbers of k bits each
    const raw = bytes(s), each = 8/k
    return Array.from({length: raw.length*each}, (_, i) => raw[Math.floor(i/each)]>>k*(i%each) & (1<<k)-1)
  }
  // for each patch after a stage (0 is the start) the first patch of its group; -1 if it was dropped
  const groups = (photo, method, rate, stage) => {
    const said = photo.methods[method][rate]
    if (!merges(method)) return bits(said, 2).map((gone, i) => gone<stage && gone<3 ? -1 : i)
    const [when,whom] = said.split(' '), at = bits(when, 4), to = bytes(whom), first = []
    // whom may have been joined to another at a later stage
    const root = i => at[i]<stage ? root(to[i]) : i
    for (let i = 0; i<n; i++) first.push(root(i))
    return first
  }
  const mean = (photo, ids) => [0,1,2].map(c => ids.reduce((s, i) => s+photo.colours[4*i+c], 0)/ids.length)
  const part = v => v>=.001 ? (100*v).toFixed(2)+'%' : 'under 0.1%'
  let made = 0

  function explorer(root) {
    const id = s => `pe${made}-${s}`, state = {photo: 0, rate: 2, stage: 3, patch: 130}
    made++
    const my = s => root.querySelector('#'+id(s))
    const name = (s, text) => `<label for="${id(s)}">${text} <output id="${id(s)}-now" for="${id(s)}"></output></label>`
    root.setAttribute('role', 'group')
    root.setAttribute('aria-label', 'Explorer: which patches stay')
    root.innerHTML = `<p>Click a patch, or go to a picture with Tab and choose one with the arrow keys.</p><div class="pe-photos" role="group" aria-label="photograph">${data.photos.map((p, i) =>
        `<button type="button" data-photo="${i}" aria-pressed="false"><img alt="" src="data:image/webp;base64,${p.image}">${p.name}</button>`).join('')}</div>
      <div class="pe-controls">
        <div>${name('rate', 'keep rate')}<input type="range" id="${id('rate')}" min="0" max="${data.rates.length-1}" step="1"></div>
        <div>${name('stage', 'after')}<input type="range" id="${id('stage')}" min="0" max="${stages.length-1}" step="1"></div>
        <button type="button" class="pe-play" id="${id('play')}">play</button></div>
      <div class="pe-pictures">${methods.map(m => `<figure data-method="${m}"><div class="pe-picture" tabindex="0" role="application"
        aria-roledescription="picture of patches"><canvas width="${px}" height="${px}"></canvas></div><figcaption></figcaption></figure>`).join('')}</div>
      <div class="pe-why"><p aria-live="polite" id="${id('why')}"></p>
        <div class="pe-heads" id="${id('heads')}"></div></div>`

    const picture = m => root.querySelector(`figure[data-method="${m}"]`)
    const current = m => groups(data.photos[state.photo], m, data.rates.length-1-state.rate, state.stage)
    const counted = (m, stage=state.stage) => data.counts[m][data.rates.length-1-state.rate][stage]

    function paint(m) {
      const photo = data.photos[state.photo], c = picture(m).querySelector('canvas').getContext('2d'), of = current(m)
      const members = {}
      of.forEach((g, i) => g<0 || (members[g] ||= []).push(i))
      c.drawImage(photo.picture, 0, 0, px, px)
      const box = (i, style) => { c.fillStyle = style; c.fillRect(i%side*cell, Math.floor(i/side)*cell, cell, cell) }
      const light = {}
      of.forEach((g, i) => { if (g<0) box(i, 'rgba(190,190,190,.92)') })
      for (const [g,ids] of Object.entries(members)) {
        if (ids.length<2) continue
        const colour = mean(photo, ids)
        light[g] = .299*colour[0]+.587*colour[1]+.114*colour[2]>140
        ids.forEach(i => box(i, `rgb(${colour.map(Math.round)})`))
      }
      const line = (i, below, style, wide) => { // at the left or the top of a patch
        const x = i%side*cell, y = Math.floor(i/side)*cell
        c.fillStyle = style
        below ? c.fillRect(x-wide/2, y-wide/2, cell+wide, wide) : c.fillRect(x-wide/2, y-wide/2, wide, cell+wide)
      }
      const edges = (inside, style, wide) => { // where `inside` changes
        for (let i = 0; i<n; i++) for (const below of [false,true]) {
          const j = below ? i-side : i%side ? i-1 : -1
          if (inside(i)!==inside(j)) line(i, below, style(i), wide)
        }
      }
      if (merges(m) && state.stage) edges(i => of[i] ?? null, i => light[of[i]] ? 'rgba(0,0,0,.7)' : 'rgba(255,255,255,.8)', 1.2)
      {
        const g = of[state.patch], chosen = i => i>=0 && (i===state.patch || g>=0 && of[i]===g)
        edges(chosen, () => '#fff', 6)
        edges(chosen, () => '#c2410c', 3.5)
        for (let i = 0; i<n; i++) if (chosen(i)) { // right and lower edge of the picture
          if (i%side===side-1) { c.fillStyle = '#c2410c'; c.fillRect(px-3, Math.floor(i/side)*cell, 3, cell) }
          if (i>=n-side) { c.fillStyle = '#c2410c'; c.fillRect(i%side*cell, px-3, cell, 3) }
        }
      }
      return Object.values(members)
    }

    function draw() {
      const photo = data.photos[state.photo], k = data.rates.length-1-state.rate
      const costs = methods.map(m => data.gflops[m][k]), low = Math.min(...costs), high = Math.max(...costs)
      my('rate').value = state.rate
      my('stage').value = state.stage
      my('rate-now').textContent = `${data.rates[k]}: ${low.toFixed(2)}${low<high ? ' to '+high.toFixed(2) : ''} GFLOPs instead of ${data.whole.toFixed(2)}`
      my('rate').setAttribute('aria-valuetext', my('rate-now').textContent)
      my('stage-now').textContent = stages[state.stage]
      my('stage').setAttribute('aria-valuetext', 'after '+stages[state.stage])
      root.querySelectorAll('[data-photo]').forEach(b => b.setAttribute('aria-pressed', +b.dataset.photo===state.photo))
      for (const m of methods) {
        const seen = paint(m), tokens = counted(m), fused = tokens-seen.length, figure = picture(m)
        const big = seen.filter(s => s.length>1).length
        figure.dataset.shown = seen.length
        figure.dataset.tokens = tokens
        const more = merges(m) ? (big ? `, ${big} of them groups` : '') : fused ? `: ${seen.length} patches, and ${fused} of dropped ones` : ''
        figure.querySelector('figcaption').innerHTML = `<b>${data.titles[m]}</b> ${tokens} tokens${more}`
        figure.querySelector('.pe-picture').setAttribute('aria-label', `${photo.name}, ${data.titles[m]}, after ${stages[state.stage]}: ` +
          `${tokens} tokens of ${n} patches${more}. The arrow keys choose a patch.`)
      }
    }

    function fate(m) { // what a method does with the chosen patch, in words
      const photo = data.photos[state.photo], k = data.rates.length-1-state.rate, i = state.patch, title = `<b>${data.titles[m]}</b> `
      if (!merges(m)) {
        const gone = bits(photo.methods[m][k], 2)[i], place = bytes(photo.rank[m])[i]+1
        const first = `in block 3 it has place ${place} of ${n}, and ${counted(m, 1)-1} stay`
        if (gone===3) return title+`keeps it to the end: ${first}.`
        if (gone===0) return title+`drops it in block 3: there it has place ${place} of ${n}, and ${counted(m, 1)-1} stay.`
        return title+`drops it in ${stages[gone+1]}: ${first}, but in ${stages[gone+1]} only ${counted(m, gone+1)-1} tokens of ${counted(m, gone)} do.`
      }
      const of = current(m), size = of.filter(g => g===of[i]).length, last = groups(photo, m, k, 4), end = last.filter(g => g===last[i]).length
      const verb = m==='fold' ? 'folds' : 'merges', alone = 'keeps it by itself'
      const now = state.stage===0 ? '' : size===1 ? `${alone} up to ${stages[state.stage]}` : `${verb} it into a group of ${size} patches by ${stages[state.stage]}`
      if (state.stage===4) return title+(size===1 ? alone+' to the end.' : `${now}.`)
      const then = end===1 ? `${alone} to the end` : `${verb} it into a group of ${end} by the last block`
      return title+(now && end!==size ? `${now}, and ${then}.` : now && end===1 ? `${then}.` : (now || then)+'.')
    }

    function explain() {
      const photo = data.photos[state.photo], i = state.patch, row = Math.floor(i/side)+1, column = i%side+1
      my('why').innerHTML = `Row ${row}, column ${column}. `+methods.map(fate).join(' ')
      const raw = bytes(photo.heads).slice(6*i, 6*i+6), values = Array.from(raw, v => v/255*photo.top)
      const rows = values.map((v, h) => `<tr><th scope="row">head ${h+1}</th><td class="pe-bar"><i style="width:${raw[h]/2.55}%"></i></td><td>${part(v)}</td></tr>`)
      my('heads').innerHTML = `<table><caption>Of its attention in block 3, the class token pays this patch (the bar's end is the most that any patch here gets from any head, ${part(photo.top)}):</caption>${rows.join('')}</table>`
    }
    const update = () => { draw(); explain() }

    let timer = null
    const stop = () => { clearInterval(timer); timer = null; my('play').textContent = 'play' }
    const play = () => {
      state.stage = 0
      my('play').textContent = 'stop'
      timer = setInterval(() => { state.stage++; if (state.stage===stages.length-1) stop(); update() }, 900)
      update()
    }
    my('play').onclick = () => timer ? stop() : play()
    my('rate').oninput = e => { state.rate = +e.target.value; update() }
    my('stage').oninput = e => { stop(); state.stage = +e.target.value; update() }
    root.querySelectorAll('[data-photo]').forEach(b => b.onclick = () => { state.photo = +b.dataset.photo; update() })
    root.querySelectorAll('.pe-picture').forEach(p => {
      p.onclick = e => {
        const r = p.querySelector('canvas').getBoundingClientRect(), at = (v, from, size) => Math.min(side-1, Math.max(0, Math.floor((v-from)/size*side)))
        state.patch = at(e.clientY, r.top, r.height)*side+at(e.clientX, r.left, r.width)
        update()
      }
      p.onkeydown = e => {
        const move = {ArrowLeft: [0,-1], ArrowRight: [0,1], ArrowUp: [-1,0], ArrowDown: [1,0]}[e.key]
        if (!move || e.ctrlKey || e.altKey || e.metaKey) return
        e.preventDefault()
        const i = state.patch, to = (v, by) => Math.min(side-1, Math.max(0, v+by))
        state.patch = to(Math.floor(i/side), move[0])*side+to(i%side, move[1])
        update()
      }
    })
    state.rate = data.rates.length-1-data.rates.indexOf(.7) // the slider's left end is the lowest rate
    update()
  }

  const ready = p => new Promise(done => { // its pixels, and the mean colour of each patch
    p.picture = new Image()
    p.picture.onload = () => {
      const c = Object.assign(document.createElement('canvas'), {width: px, height: px}).getContext('2d')
      c.drawImage(p.picture, 0, 0, px, px)
      const all = c.getImageData(0, 0, px, px).data
      p.colours = new Float32Array(4*n)
      for (let y = 0; y<px; y++) for (let x = 0; x<px; x++) for (let k = 0; k<3; k++)
        p.colours[4*(Math.floor(y/cell)*side+Math.floor(x/cell))+k] += all[4*(y*px+x)+k]/cell**2
      done()
    }
    p.picture.src = 'data:image/webp;base64,'+p.image
  })
  Promise.all(data.photos.map(ready)).then(() => document.querySelectorAll('.patch-explorer').forEach(explorer))
})()
