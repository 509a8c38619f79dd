// linear_q4gsw in a browser: what int4q/kernels/webgpu/linear.py does, on the same .wgsl files.

const DECODE_MAX_ROWS = 8;
const COLUMNS = 8;
const TILE = 64;

/** The adapter's device with the largest buffers it allows; throws where there is no WebGPU. */
export async function openGpu() {
  if (!navigator.gpu) throw new Error("This browser has no WebGPU.");
  const adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) throw new Error("WebGPU found no adapter.");
  const { maxStorageBufferBindingSize, maxBufferSize } = adapter.limits;
  const device = await adapter.requestDevice({
    requiredLimits: { maxStorageBufferBindingSize, maxBufferSize },
  });
  const { vendor, architecture, description } = adapter.info;
  const name = description || [vendor, architecture].filter(Boolean).join(" ") || "unnamed adapter";
  return { device, name };
}

/** A shader file as a module, after the lines that choose its types (webgpu_device.source). */
export async function shaderModule(device, url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status}`);
  const code = `alias Scale = f32;\nalias Tile = f32;\n${await response.text()}`;
  return device.createShaderModule({ label: url, code });
}

/** Both pipelines of linear_q4gsw for one group size. */
export async function linearPipelines(device, folder, groupSize) {
  const pipeline = async (name) => {
    const module = await shaderModule(device, `${folder}/${name}.wgsl`);
    const constants = { GROUP_SIZE: groupSize };
    return device.createComputePipelineAsync({ layout: "auto", compute: { module, constants } });
  };
  return { decode: await pipeline("q4gsw_decode"), prefill: await pipeline("q4gsw_prefill") };
}

export function storageBuffer(device, data) {
  const size = typeof data === "number" ? data : data.byteLength;
  const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST;
  const buffer = device.createBuffer({ size, usage });
  if (typeof data !== "number") device.queue.writeBuffer(buffer, 0, data);
  return buffer;
}

export function uniformBuffer(device, numbers) {
  const usage = GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST;
  const buffer = device.createBuffer({ size: numbers.byteLength, usage });
  device.queue.writeBuffer(buffer, 0, numbers);
  return buffer;
}

export function bindGroup(device, pipeline, buffers) {
  return device.createBindGroup({
    layout: pipeline.getBindGroupLayout(0),
    entries: buffers.map((buffer, binding) => ({ binding, resource: { buffer } })),
  });
}

/** One layer whose weight stays on the adapter. `packed` is what int4q's pack() made. */
export class LinearQ4gsw {
  constructor(device, pipelines, packed) {
    Object.assign(this, { device, pipelines, packed });
    this.buffers = [packed.weights, packed.scales, packed.bias].map((part) =>
      storageBuffer(device, part),
    );
  }

  get bytes() {
    return this.buffers.reduce((sum, buffer) => sum + buffer.size, 0);
  }

  /** A function (pass) => void that multiplies x [rows, K] into y [rows, N]. */
  prepare(rows, x, y) {
    const { columns, padded_columns, blocks } = this.packed;
    const decode = rows <= DECODE_MAX_ROWS;
    const pipeline = decode ? this.pipelines.decode : this.pipelines.prefill;
    const shape = uniformBuffer(
      this.device,
      new Uint32Array([rows, columns, padded_columns, blocks]),
    );
    const group = bindGroup(this.device, pipeline, [x, ...this.buffers, y, shape]);
    const size = decode
      ? [padded_columns / COLUMNS, rows]
      : [Math.ceil(columns / TILE), Math.ceil(rows / TILE)];
    return (pass) => {
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, group);
      pass.dispatchWorkgroups(...size);
    };
  }
}
