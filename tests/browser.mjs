// Answers of an exported image classifier in headless Chromium: node browser.mjs FOLDER IMAGES ANSWERS.json
//
// A page of localhost loads model.onnx with onnxruntime-web, decodes each PNG file of IMAGES in the browser, and predicts from its pixels.
import fs from "fs";
import http from "http";
import path from "path";
import {createRequire} from "module";

const [folder, images, answers] = process.argv.slice(2);
const home = process.env.NODE_ONNXRUNTIME;
const {chromium} = createRequire(home + "/")("playwright-core");
const OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"];
const TYPES = {".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm", ".png": "image/png"};
const PAGE = `<!doctype html><title>predict</title><script src="/ort/ort.wasm.min.js"></script>`;
const ROOTS = {ort: path.join(home, "node_modules/onnxruntime-web/dist"), model: folder, images};

const server = http.createServer((request, response) => {
    const [, root, name] = new URL(request.url, "http://localhost").pathname.split("/");
    const file = ROOTS[root] && name && path.join(ROOTS[root], name);
    const found = file && fs.existsSync(file);
    response.writeHead(found || !root ? 200 : 404, {"Content-Type": TYPES[root ? path.extname(name ?? "") : ".html"] ?? "application/octet-stream"});
    response.end(found ? fs.readFileSync(file) : root ? "" : PAGE);
});
await new Promise(resolve => server.listen(0, "127.0.0.1", resolve));

async function predict([channels, names]) {
    ort.env.wasm.wasmPaths = "/ort/";
    ort.env.wasm.numThreads = 1;
    const session = await ort.InferenceSession.create("/model/model.onnx");
    const found = [];
    for (const name of names) {
        const blob = await (await fetch("/images/" + name)).blob();
        const image = await createImageBitmap(blob, {premultiplyAlpha: "none", colorSpaceConversion: "none"});
        const canvas = new OffscreenCanvas(image.width, image.height);
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        const {data} = context.getImageData(0, 0, image.width, image.height);  // red, green, blue, alpha
        const pixels = new Uint8Array(image.width * image.height * channels);
        for (let i = 0; i < pixels.length; i++)
            pixels[i] = data[4 * Math.floor(i / channels) + i % channels];
        const {probabilities, label} = await session.run({
            pixels: new ort.Tensor("uint8", pixels, [1, image.height, image.width, channels]),
        });
        found.push({name, label: label.data[0], probabilities: Array.from(probabilities.data)});
    }
    return found;
}

const about = JSON.parse(fs.readFileSync(path.join(folder, "export.json"), "utf-8"));
const browser = await chromium.launch({executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: OPTIONS});
try {
    const page = await browser.newPage();
    await page.goto(`http://127.0.0.1:${server.address().port}/`);
    const found = await page.evaluate(predict, [about.channels, fs.readdirSync(images).sort()]);
    fs.writeFileSync(answers, JSON.stringify({agent: await page.evaluate(() => navigator.userAgent), labels: about.labels, found}));
} finally {
    await browser.close();
    server.close();
}
