// The encoder of all-MiniLM-L6-v2 on 4-bit weights: six BERT layers, post-norm.

import { LinearQ4gsw, shaderModule, storageBuffer, uniformBuffer } from "./q4gsw.js";

export class Encoder {
  /** `manifest` as export.py writes it, `data` the ArrayBuffer of model.bin. */
  static async create(device, linear, manifest, data) {
    const module = await shaderModule(device, "encoder.wgsl");
    const make = (entryPoint) =>
      device.createComputePipelineAsync({ layout: "auto", compute: { module, entryPoint } });
    const [attention, addNorm, gelu] = await Promise.all(
      ["attention", "add_norm", "gelu"].map(make),
    );
    return new Encoder(device, { linear, attention, addNorm, gelu }, manifest, data);
  }

  constructor(device, pipelines, manifest, data) {
    Object.assign(this, { device, pipelines, manifest });
    const slice = ([start, bytes]) => new Uint8Array(data, start, bytes);
    const layer = (facts) =>
      new LinearQ4gsw(device, pipelines.linear, {
        ...facts,
        weights: slice(facts.weights),
        scales: slice(facts.scales),
        bias: slice(facts.bias),
      });
    const norm = (facts) => [facts.gain, facts.offset].map((p) => storageBuffer(device, slice(p)));
    this.layers = manifest.layers.map((facts) => ({
      qkv: layer(facts.qkv),
      out: layer(facts.out),
      norm1: norm(facts.norm1),
      up: layer(facts.up),
      down: layer(facts.down),
      norm2: norm(facts.norm2),
    }));
    this.plans = new Map();
  }

  get bytes() {
    const of = ({ qkv, out, up, down }) => qkv.bytes + out.bytes + up.bytes + down.bytes;
    return this.layers.reduce((sum, layer) => sum + of(layer), 0);
  }

  /** Buffers and bind groups for one number of tokens, made once. */
  plan(tokens) {
    if (!this.plans.has(tokens)) this.plans.set(tokens, this.makePlan(tokens));
    return this.plans.get(tokens);
  }

  makePlan(tokens) {
    const { device, pipelines, manifest } = this;
    const { hidden, heads, inner, epsilon } = manifest;
    const floats = (count) => storageBuffer(device, 4 * tokens * count);
    const facts = new DataView(new ArrayBuffer(16));
    [tokens, hidden, heads].forEach((value, i) => facts.setUint32(4 * i, value, true));
    facts.setFloat32(12, epsilon, true);
    const shape = uniformBuffer(device, new Uint8Array(facts.buffer));
    const qkv = floats(3 * hidden);
    const mixed = floats(hidden);
    const sum = floats(hidden);
    const middle = floats(hidden);
    const raised = floats(inner);
    const active = floats(inner);
    const input = floats(hidden);
    const step = (pipeline, bindings, ...size) => {
      const entries = Object.entries(bindings).map(([binding, buffer]) => ({
        binding: Number(binding),
        resource: { buffer },
      }));
      const group = device.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries });
      return (pass) => {
        pass.setPipeline(pipeline);
        pass.setBindGroup(0, group);
        pass.dispatchWorkgroups(...size);
      };
    };
    const addNorm = (from, residual, [gain, offset], to) =>
      step(pipelines.addNorm, { 0: from, 1: to, 2: shape, 3: residual, 4: gain, 5: offset }, tokens);
    const steps = [];
    const outputs = [];
    let x = input;
    for (const layer of this.layers) {
      const y = floats(hidden);
      steps.push(
        layer.qkv.prepare(tokens, x, qkv),
        step(pipelines.attention, { 0: qkv, 1: mixed, 2: shape }, tokens, heads),
        layer.out.prepare(tokens, mixed, sum),
        addNorm(sum, x, layer.norm1, middle),
        layer.up.prepare(tokens, middle, raised),
        step(pipelines.gelu, { 0: raised, 1: active }, Math.ceil((tokens * inner) / 256)),
        layer.down.prepare(tokens, active, sum),
        addNorm(sum, middle, layer.norm2, y),
      );
      outputs.push(y);
      x = y;
    }
    const bytes = 4 * tokens * hidden;
    const usage = GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST;
    const result = device.createBuffer({ size: bytes * outputs.length, usage });
    return { input, steps, outputs, result, bytes };
  }

  submit(plan, readBack) {
    const commands = this.device.createCommandEncoder();
    const pass = commands.beginComputePass();
    for (const step of plan.steps) step(pass);
    pass.end();
    if (readBack) {
      plan.outputs.forEach((buffer, i) =>
        commands.copyBufferToBuffer(buffer, 0, plan.result, i * plan.bytes, plan.bytes),
      );
    }
    this.device.queue.submit([commands.finish()]);
  }

  /** Hidden states after every layer, [layers, tokens, hidden] as one Float32Array. */
  async run(input, tokens) {
    const plan = this.plan(tokens);
    this.device.queue.writeBuffer(plan.input, 0, input);
    this.submit(plan, true);
    await plan.result.mapAsync(GPUMapMode.READ);
    const states = new Float32Array(plan.result.getMappedRange().slice(0));
    plan.result.unmap();
    return states;
  }

  /** Median milliseconds of a run whose input and output stay on the adapter. */
  async time(tokens, repeats) {
    const plan = this.plan(tokens);
    const times = [];
    for (let i = 0; i < repeats; i++) {
      const start = performance.now();
      this.submit(plan, false);
      await this.device.queue.onSubmittedWorkDone();
      times.push(performance.now() - start);
    }
    return times.sort((a, b) => a - b)[repeats >> 1];
  }
}
