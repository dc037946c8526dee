const form=document.querySelector("form.filter");form.hidden=false;
form.addEventListener("change",()=>{const s=form.source.value,t=form.task.value;
document.querySelectorAll("article").forEach(a=>a.hidden=(s&&a.dataset.source!==s)||
(t&&!a.dataset.task.split(" ").includes(t)))})
